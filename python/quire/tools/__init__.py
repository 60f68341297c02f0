"""Tools around the package: the command line, the demonstration, a small range server."""
