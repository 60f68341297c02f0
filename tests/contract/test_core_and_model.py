"""The core and the model of virtual memory, in every pmap: see `quire.testing.state_machine`."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.pmap import KERNEL
from quire.testing.pmaps import working_pmaps, writable_pmaps
from quire.testing.state_machine import KINDS, SOFT, run_beside_model

CASES = [
    (kind, pmap)
    for kind in KINDS
    for pmap in (writable_pmaps() if KINDS[kind].writes_back else working_pmaps()) + [SOFT]
] + [(kind, KERNEL) for kind in KINDS if KINDS[kind].mode is not None]


@pytest.mark.usefixtures("no_mapping_left")
@pytest.mark.parametrize(("kind", "pmap"), CASES)
def test_they_agree(kind: str, pmap: str, tmp_path: Path) -> None:
    run_beside_model(kind, pmap, tmp_path, examples=15, steps=30, shrink=False)


@pytest.mark.long
@pytest.mark.usefixtures("no_mapping_left")
@pytest.mark.parametrize(("kind", "pmap"), CASES)
def test_they_agree_for_long(kind: str, pmap: str, tmp_path: Path) -> None:
    run_beside_model(kind, pmap, tmp_path, examples=150, steps=60, shrink=True)
