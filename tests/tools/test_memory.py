"""Free memory."""

from curvlab.tools.memory import available_memory, physical_memory


def test_free_memory_is_between_a_megabyte_and_what_is_built_in():
    assert 2**20 < available_memory("cpu") <= physical_memory()
