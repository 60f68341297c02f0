"""`quire demo`: the main job on real data, measured and checked.

The demonstration turns the source text of this Python installation into a matrix larger than a
memory budget, stores it compressed, serves it over HTTP and uses it as a numpy array. Each part
runs where its memory cannot be mistaken for quire's:

    run.py          conducts; this is the process of the command line
      corpus.py     lines of Python sources                      (same process)
      features.py   lines -> matrix, streamed to a .npy file     (same process)
      server.py     the local HTTP server                        (a process of its own)
      measure.py    quire: open, scan, look up                   (a process of its own, measured)
      plain.py      the same work on the plain file in RAM       (a process of its own)
      picture.py    the picture                                  (a process of its own)
    workload.py     the work itself, the same code for both sides
    watch.py        samples memory and residency while it runs
    independent.py  reads a user's array without quire
    check.py        compares both sides
    report.py       tables, text, JSON
"""
