"""Every input that fuzzing kept, and sound ones, is read or refused with a `DaqError`, soon."""

import json
import time

import pytest

from tests.readers import CORPUS, READERS

SLOW = 1.0  # seconds of processor time


@pytest.mark.parametrize("name", READERS)
def test_what_fuzzing_found_is_read_or_refused(name, tmp_path):
    reader = READERS[name](tmp_path / name)
    seeds = reader.seeds()
    said = [reader.read(data) for data in seeds]
    assert "" in said  # so that not everything is refused
    for text in json.loads((CORPUS / f"{name}.json").read_text()):
        start = time.thread_time()
        reader.read(text.encode("latin-1"))
        assert time.thread_time() - start < SLOW
