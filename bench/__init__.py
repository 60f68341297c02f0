"""Benchmarks: quire beside its competitors, in one run, with answers checked.

`python -m bench` (or `make bench`) runs every topic, each in a process of its own:

    hot_rows.py       resident pages beside numpy.memmap
    zstd_rows.py      compressed local data beside zarr and tensorstore
    remote_rows.py    HTTP beside obstore and fsspec
    faults.py         one fault beside the bare floor program (floor.c)
    import_time.py    what `import quire` costs
    data.py           the data all of them use
    timing.py         rounds, medians, warm-up
    result.py         figures, targets, tables
"""
