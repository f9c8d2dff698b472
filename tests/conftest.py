"""What several test files share. No test asks a network for anything: a name on the hub is looked
for in its cache alone."""

import os

import pytest
import torch

from utils.cli import InputError, parse_settings, run_script

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors are slow on several threads of a busy machine. And a sum's order, hence its
    rounding, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused_in_one_line(capsys):
    """refused_in_one_line(world, argv): a toy world's script with these words ends with status 2
    and one line that says why."""
    def check(world, argv):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: world.main(parse_settings(world.Settings, argv)))
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        with pytest.raises(InputError):
            world.main(parse_settings(world.Settings, argv))
    return check
