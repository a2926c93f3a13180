"""Killed at any moment, two at once, a full disk: every command that writes ends with the bytes of an undisturbed run.

The commands run in forks of a server that has imported everything, which spares them the start of Python; of a server and not
of this process, because autograd does not work in the fork of a process that has used it.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jsonargparse")

from attnkd import files
from attnkd.commands import cli
from attnkd.demo import command
from attnkd.methods.head_importance import head_importance
from attnkd.training import checkpoint, run, sources, teacher_cache

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="commands are killed in forks"
)


@functools.cache
def server():
    context = multiprocessing.get_context("forkserver")
    commands = ["attnkd.commands.cli", "attnkd.commands.train", "attnkd.training.run", "attnkd.demo.command"]
    context.set_forkserver_preload([*commands, "sklearn.datasets", "jsonargparse", "timm", "pytest"])
    first = context.Process(target=os.getpid)  # starts the server, whose imports take longer than a run
    first.start()
    first.join()
    return context


def child(work, words, file_limit, log):
    torch.set_num_threads(1)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if file_limit is not None:
        # Python would cut off what it compiles, too, and keep it.
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    status = work(*words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


SAID = Path(tempfile.mkdtemp()) / "said"
"""What processes print that nobody listens to: for the message of a test that fails."""


def start(work, *words, file_limit=None, log=str(SAID)):
    """A process that runs ``work(*words)`` and exits with what it returns."""
    process = server().Process(target=child, args=(work, words, file_limit, log))
    process.start()
    return process


def last_line(run, pipe, **limits):
    """Exit status and last line of output of ``run(log=, **limits)``; through a pipe, which no limit on files cuts."""
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as said:
        status = finish(run(log=str(pipe), **limits))
        return status, said.read().splitlines()[-1]


def finish(process):
    process.join(300)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def kill_until_done(run, seed, kills):
    """Start ``run()`` again and again and kill it: after a random part of an undisturbed run's time, by one signal or the other."""
    server()  # its start is not part of a run
    rng, statuses = random.Random(seed), []
    began = time.monotonic()
    assert finish(run("undisturbed")) == 0
    whole = time.monotonic() - began
    for number in range(kills):
        process = run("killed")
        time.sleep(rng.uniform(0, whole))
        with contextlib.suppress(ProcessLookupError):  # it was faster than the undisturbed run
            os.kill(process.pid, signal.SIGKILL if number % 2 else signal.SIGTERM)
        statuses.append(finish(process))
        # The last: before the command began.
        assert statuses[-1] in (0, 143, -signal.SIGKILL, -signal.SIGTERM), SAID.read_text()[-2000:]
    assert finish(run("killed")) == 0
    return statuses


@pytest.fixture(scope="module")
def selecting(tmp_path_factory):
    """`attnkd select` over 24 tiny images, as a function of the list to write."""
    folder = tmp_path_factory.mktemp("select")
    (folder / "wild").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(24):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "wild" / f"{index}.png")
    (folder / "wild" / "broken.png").write_text("no image")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=5).state_dict(), folder / "t.pth")
    options = ["--data", folder / "wild", "--teacher", "test_vit", "--checkpoint", folder / "t.pth"]
    options += ["--model-kwargs", "img_size=32", "patch_size=8", "--num-select", 9, "--batch-size", 4, "--workers", 0]
    options += ["--device", "cpu"]

    def run(out, *more, **limits):
        return start(cli.main, ["select", *map(str, options), "--out", str(out), *map(str, more)], **limits)

    return run


def outputs(folder):
    """What a selection leaves, but for the note that names its folder."""
    return [
        (folder / name).read_bytes() for name in ("l.txt", "l.csv", "l.txt.work/scores.csv", "l.txt.work/files.txt")
    ]


def test_select_killed_at_random_moments(selecting, tmp_path):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    kill_until_done(lambda name: selecting(tmp_path / name / "l.txt"), seed=1, kills=8)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "undisturbed")
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.name == "again.txt"]


def test_two_selections_into_one_list(selecting, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert finish(selecting(tmp_path / "one" / "l.txt")) == 0
    both = [selecting(tmp_path / "two" / "l.txt") for _ in range(2)]
    assert [finish(process) for process in both] == [0, 0]  # the second waits for the first, and finds its scores
    assert outputs(tmp_path / "two") == outputs(tmp_path / "one")


@pytest.mark.parametrize("name", ["l.txt.work/files.txt", "l.txt.work/scores.csv", "l.csv"])
def test_select_on_a_full_disk(selecting, tmp_path, name):
    """The list of files, the scores, or the table does not fit."""
    for folder in ("undisturbed", "full"):
        (tmp_path / folder).mkdir()
    assert finish(selecting(tmp_path / "undisturbed" / "l.txt")) == 0
    limit = (tmp_path / "undisturbed" / name).stat().st_size - 1
    status, last = last_line(
        functools.partial(selecting, tmp_path / "full" / "l.txt"), tmp_path / "said", file_limit=limit
    )
    assert status == 1
    assert last.startswith(f"attnkd select: {tmp_path / 'full'}") and last.endswith("File too large"), last
    assert not (tmp_path / "full" / "l.txt").exists()
    assert finish(selecting(tmp_path / "full" / "l.txt")) == 0
    assert outputs(tmp_path / "full") == outputs(tmp_path / "undisturbed")


def demonstrating(folder, *options, **limits):
    """`attnkd demo` on a handful of digits."""
    return start(small_demo, str(folder), *options, **limits)


def small_demo(folder, *options):
    """Without the pictures, which take most of the time."""
    for drawing in ("draw_attention", "draw_comparison"):
        setattr(command.figures, drawing, lambda outcome, path: files.write_bytes(path, bytes(1000)))
    small = {"seeds": 1, "epochs": 1, "train_size": 128, "test_size": 64}
    command.QUICK.update(small)
    command.QUICK_ALL.update(small, teacher_epochs=1, labelled=64, wild_digits=64, wild_photos=32)
    return cli.main(["demo", "--quick", "--device", "cpu", "--output-dir", folder, *options])


def results(folder: Path):
    """Weights, pictures, tables and numbers of a demo, but for the time that it took."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = [
        path for path in folder.rglob("*.*") if path.suffix in KEPT and path.name != checkpoint.NAME
    ]  # which names its folder
    found = {path.relative_to(folder): path.read_bytes() for path in kept}
    return found, {name: value for name, value in summary.items() if name not in ("seconds", "jobs")}


KEPT = (".safetensors", ".png", ".md", ".txt", ".csv")


@pytest.mark.parametrize("options", [(), ("--all",)], ids=["guidance", "all methods"])
def test_demo_killed_at_random_moments_twice_at_once_and_on_a_full_disk(tmp_path, options):
    def run(name, **limits):
        return demonstrating(tmp_path / name, *options, **limits)

    status, last = last_line(functools.partial(run, "killed"), tmp_path / "said", file_limit=100_000)
    assert status == 1
    assert last.startswith(f"attnkd demo: {tmp_path / 'killed'}") and last.endswith("File too large"), last

    kill_until_done(run, seed=2, kills=2)
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")
    both = [run("killed") for _ in range(2)]
    assert sorted(finish(process) for process in both) in ([0, 0], [0, 1])  # the second may be refused
    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")


def test_demo_in_two_processes_ends_like_one_and_leaves_none_behind(tmp_path):
    assert finish(demonstrating(tmp_path / "one")) == 0
    os.mkfifo(tmp_path / "said")
    said = os.open(tmp_path / "said", os.O_RDONLY | os.O_NONBLOCK)
    for number, stage in ((signal.SIGTERM, "teacher"), (signal.SIGKILL, "student")):
        process = demonstrating(tmp_path / "two", "--jobs", "2", log=str(tmp_path / "said"))
        while not list((tmp_path / "two").glob(f"{stage}-*/{checkpoint.NAME}")):
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, number)
        assert finish(process) in (143, -signal.SIGKILL)
        end = time.monotonic() + 60
        while open_for_writing(said):  # all of its processes write there
            assert time.monotonic() < end, "a process is left"
            time.sleep(0.01)
    assert finish(demonstrating(tmp_path / "two", "--jobs", "2")) == 0
    assert results(tmp_path / "two") == results(tmp_path / "one")


def open_for_writing(pipe):
    try:
        return bool(os.read(pipe, 1 << 16))
    except BlockingIOError:
        return True


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Six steps of `attnkd train ssta`, each of them saved, as a function of the run's folder."""
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 16, "in_chans": 1, "patch_size": 4, "depth": 3}
    arguments |= {"embed_dim": 16, "num_heads": 2, "num_classes": 10}
    folder = tmp_path_factory.mktemp("teacher")
    run.save_student(folder, timm.create_model(**arguments), arguments)
    teacher = str(folder / "model.safetensors")
    options = ["--recipe", "ssta_digits", "--teacher", teacher, "--assistant", teacher, "--device", "cpu"]
    options += ["--method.teacher_heads", "[1, 0, 1]", "--train.epochs", "2", "--train.batch_size", "10"]
    options += ["--train.warmup_epochs", "1", "--train.ema_decay", "0.5", "--run.save_steps", "1"]
    options += ["--run.log_steps", "1", "--run.workers", "0"]

    def command(output, **limits):
        return start(train_on_few_digits, ["train", "ssta", *options, "--output", str(output)], **limits)

    return command


def train_on_few_digits(words):
    whole = sources._digits

    def fewer(split):
        source = whole(split)
        return source._replace(images=sources._Digits(source.images.pixels[:30], source.images.labels[:30]))

    sources._digits = fewer
    return cli.main(words)


def trained(folder):
    """Student, state and log of a run, without its speed and its folder's name."""
    state = checkpoint.load(folder / checkpoint.NAME)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in (*log, state["settings"]):
        record.pop("images_per_second", None), record.pop("output", None)
    checkpoint.save(folder / "state", state)
    return (folder / "model.safetensors").read_bytes(), (folder / "state").read_bytes(), log


def test_train_killed_at_random_moments_twice_at_once_and_on_a_full_disk(training, tmp_path):
    statuses = kill_until_done(lambda name: training(tmp_path / name), seed=4, kills=20)
    assert -signal.SIGKILL in statuses
    assert trained(tmp_path / "killed") == trained(tmp_path / "undisturbed")

    status, last = last_line(functools.partial(training, tmp_path / "full"), tmp_path / "said", file_limit=20_000)
    assert status == 1
    assert last.startswith(f"attnkd train: {tmp_path / 'full'}") and last.endswith("File too large"), last
    assert not list((tmp_path / "full").glob("*.safetensors")) and not list((tmp_path / "full").glob(".*.tmp"))
    both = [training(tmp_path / "full") for _ in range(2)]
    assert sorted(finish(process) for process in both) in ([0, 0], [0, 1])  # the second waits, or is refused
    assert trained(tmp_path / "full") == trained(tmp_path / "undisturbed")


def test_train_saves_after_a_sigterm_and_ends_with_status_0(training, tmp_path):
    process = training(tmp_path / "run", log=str(tmp_path / "said"))
    end = time.monotonic() + 200
    while not (tmp_path / "run" / checkpoint.NAME).exists():
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 0
    said = (tmp_path / "said").read_text().splitlines()[-1]
    done = checkpoint.load(tmp_path / "run" / checkpoint.NAME)["done"]
    assert said == f"step {done} of 6: stopped and saved; run the same command again to continue"
    assert done < 6 and not (tmp_path / "run" / "model.safetensors").exists()


def search(path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=5)
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])) for _ in range(12)]
    head_importance(model, batches, (-2, -1), path=path, progress=False)
    return 0


def test_head_importance_killed_at_random_moments(tmp_path):
    kill_until_done(lambda name: start(search, tmp_path / name), seed=3, kills=4)
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "undisturbed").read_bytes()


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """The commands that write one file, each as a function of that file."""
    folder = tmp_path_factory.mktemp("one file")
    Image.new("RGB", (160, 160), (90, 20, 200)).save(folder / "image.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "weights.pth")
    models = [f"--{name}" for name in ("teacher", "teacher-checkpoint", "student", "student-checkpoint")]
    given = ["test_vit", folder / "weights.pth"] * 2
    options = [str(word) for pair in zip(models, given, strict=True) for word in pair]
    return {
        "validate": ["validate", "--impl", "chunked", "--case", "N=8,D=16,Dt=16", "--device", "cpu", "--json"],
        "maps": ["maps", str(folder / "image.png"), *options, "--no-rollout", "--device", "cpu", "--output"],
    }


@pytest.mark.parametrize("name", ["validate", "maps"])
def test_a_command_leaves_the_old_file_or_the_new_one(one_file, tmp_path, name):
    """Killed, with a full disk, and twice at once."""

    def run(file, **limits):
        (tmp_path / file).mkdir(exist_ok=True)
        return start(cli.main, [*one_file[name], str(tmp_path / file / "out.png")], **limits)

    kill_until_done(run, seed=4, kills=2)
    whole = (tmp_path / "undisturbed" / "out.png").read_bytes()
    status, last = last_line(functools.partial(run, "killed"), tmp_path / "said", file_limit=len(whole) - 1)
    assert status == 1 and last == f"attnkd {name}: {tmp_path / 'killed' / 'out.png'}: File too large"
    assert (tmp_path / "killed" / "out.png").read_bytes() == whole
    assert [finish(process) for process in (run("both"), run("both"))] == [0, 0]
    assert (tmp_path / "both" / "out.png").read_bytes() == whole
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["out.png"]


# --- the helper itself ------------------------------------------------------------------------------------------------


def write_forever(path, contents):
    while True:
        for content in contents:
            files.write_text(path, content)


def test_a_reader_finds_the_old_file_or_the_new_one_whole(tmp_path):
    path = tmp_path / "x.json"
    contents = [json.dumps(["old"] * 1000), json.dumps(["new"] * 2000)]
    files.write_text(path, contents[0])
    writers = [start(write_forever, path, contents) for _ in range(2)]
    end = time.monotonic() + 1
    while time.monotonic() < end:
        assert path.read_text() in contents
    for writer in writers:
        writer.kill()
        finish(writer)
    assert path.read_text() in contents


def test_replacing_keeps_what_was_there_after_an_error(tmp_path):
    path = tmp_path / "x.txt"
    files.write_text(path, "before")
    path.chmod(0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["link.txt", "x.txt"]
    files.write_text(link, "after")
    assert link.is_symlink() and path.read_text() == "after" and path.stat().st_mode & 0o777 == 0o640


def test_what_is_no_file_is_written_to_directly(tmp_path):
    files.check_writable("json", "/dev/null")
    files.write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()


def test_old_temporary_files_go_and_young_ones_stay(tmp_path):
    old, young, other = (tmp_path / name for name in (".x.0123456789ab.tmp", ".y.0123456789ab.tmp", ".mine.tmp"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    files.make_folder("out", tmp_path)
    assert not old.exists() and young.exists() and other.exists()


def hold(folder):
    with files.locked(folder / "lock"):
        (folder / "held").touch()
        time.sleep(60)


def test_a_lock_ends_with_its_process_and_names_the_file(tmp_path, monkeypatch):
    holder = start(hold, tmp_path)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="lock: another process is at work there"), files.locked(tmp_path / "lock"):
        pass
    holder.kill()
    finish(holder)
    with files.locked(tmp_path / "lock"):
        pass


def cache_few_digits(words):
    teacher_cache.SHARD = 3
    return train_on_few_digits(words)


def kept(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_cache_killed_at_random_moments_twice_at_once_and_on_a_full_disk(tmp_path):
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 16, "in_chans": 1, "patch_size": 4, "depth": 3}
    arguments |= {"embed_dim": 16, "num_heads": 2, "num_classes": 10}
    run.save_student(tmp_path, timm.create_model(**arguments), arguments)
    words = [
        "cache",
        "attn_distill",
        "--recipe",
        "attn_distill_digits",
        "--teacher",
        str(tmp_path / "model.safetensors"),
    ]
    words += ["--device", "cpu", "--train.crop_scale", "[1, 1]", "--run.workers", "0", "--method.patch_weight", "1"]

    def command(name, **limits):
        return start(cache_few_digits, [*words, "--output", str(tmp_path / name)], **limits)

    statuses = kill_until_done(command, seed=6, kills=10)
    assert -signal.SIGKILL in statuses
    whole = kept(tmp_path / "undisturbed")
    assert len(whole) == 11 and kept(tmp_path / "killed") == whole

    status, last = last_line(functools.partial(command, "full"), tmp_path / "said", file_limit=2_000)
    assert status == 1 and last.startswith(f"attnkd cache: {tmp_path / 'full'}") and last.endswith("File too large"), (
        last
    )
    assert not list((tmp_path / "full").glob("*.safetensors")) and not list((tmp_path / "full").glob(".*.tmp"))
    both = [command("full") for _ in range(2)]
    assert sorted(finish(process) for process in both) in ([0, 0], [0, 1])  # the second waits, or is refused
    assert kept(tmp_path / "full") == whole
