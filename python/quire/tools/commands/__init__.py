"""The verbs of the command line: one module each, whose function of the same name is the verb.

The function's docstring is its help. It returns the exit status, or None for 0; data go to
standard output, words to standard error; a `quire.Error` it raises is printed as one message.
"""
