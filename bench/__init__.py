"""Benchmarks: quire beside its competitors, in one run, with answers checked.

`python -m bench` (or `make bench`) runs every topic, each in a process of its own:

    hot_rows.py       resident pages beside numpy.memmap
    zstd_rows.py      compressed local data beside zarr and tensorstore
    remote_rows.py    HTTP beside obstore and fsspec
    paging.py         reading: faults (faults.py), 1 TiB (sparse.py), sequential, resident pages
    writes.py         random writes over budget, and sync, beside numpy.memmap
    swap.py           anonymous memory over budget beside the kernel's swap (kernel_swap.py)
    import_time.py    what `import quire` costs
    model.py          the machine in Python: translations, and its rows replayed
    floor.py          the bare floor program and its loops (floor.c), compiled
    data.py           the data all of them use
    timing.py         rounds, medians, warm-up
    result.py         figures, targets, tables
"""
