"""The system calls of `AddressSpace`, one file for each: checks as data, then the effect."""
