"""The system calls of `AddressSpace`, one file for each noun:

checks as data first, then the effect.
"""
