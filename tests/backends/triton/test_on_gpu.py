"""Passes through a driver: the kernels of a package, their memory and graphs, on a card that is main memory and whose
processors are Triton's interpreter."""

import ctypes

import pytest
import torch

from tpvc.compiler import frontends
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.backends import triton
from tpvc.compiler.backends.triton import asked, candidates, engine, shapes_of, tiles
from tpvc.compiler.backends.triton.engine import Draw, Engine
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.backends.triton.on_gpu import OnGpu
from tpvc.compiler.backends.triton.on_torch import OnTorch
from tpvc.compiler.backends.triton.plan import arena, key_of, recorded
from tpvc.compiler.engines import open_engine, room
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, dense, linears
from tpvc.kernels import driver, package, pointwise
from tpvc.kernels.aot import Binary, Built, Kept, Resources
from tpvc.kernels.launch import Launch, with_triton
from tpvc.kernels.targets import named
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_to_nearest import quantize as to_nearest

CAPACITY, SLOTS = 24, 2
LISTENER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p)
)
READS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
DTYPES = {"*fp32": torch.float32, "*i32": torch.int32, "*i64": torch.int64, "*u8": torch.uint8, "*i8": torch.int8}


class Card:
    """What a fake driver tells of, carried out. A binary is the sizes of its parameters and the number of a variant."""

    def __init__(self, path, variants):
        self.variants, self.graphs, self.capture = variants, {}, None
        self.launched = self.replayed = 0
        self.listener = LISTENER(self.told)
        ctypes.CDLL(path).fake_listen(self.listener)

    def told(self, what, handle, x, y, z, args):
        if what == b"begin":
            self.capture = []
        elif what == b"end":
            self.graphs[handle], self.capture = self.capture, None
        elif what == b"replay":
            self.replayed += 1
            for launch in self.graphs[handle]:
                with_triton(launch)
        else:
            variant = self.variants[int(ctypes.string_at(handle).split(b"#")[1])]
            launch = Launch(variant.kernel, (x, y, z), self.read(variant, args), dict(variant.constants))
            if self.capture is None:
                self.launched += 1
                with_triton(launch)
            else:
                self.capture.append(launch)

    @staticmethod
    def read(variant, args):
        given, found = iter(args), []
        for _, kind in variant.params:
            if kind == "none":
                found.append(None)
            elif kind in READS:
                found.append(ctypes.cast(next(given), ctypes.POINTER(READS[kind]))[0])
            else:
                address = ctypes.cast(next(given), ctypes.POINTER(ctypes.c_uint64))[0]
                number = (ctypes.c_char * 8).from_address(address)  # the interpreter goes by the address
                found.append(torch.frombuffer(number, dtype=DTYPES[kind], count=1))
        return tuple(found)


@pytest.fixture(scope="module", params=[None, "int8"], ids=["W4A16", "W4A8"])
def model(request, tiny_llama):
    program = frontends.load(tiny_llama)
    program = program if request.param is None else RoundActivations(request.param)(program)
    names = [n.params["weight"] for n in linears(program.nodes) if n.block is not None]  # the head stays float
    grid = Grid(4, 32, False)
    program = program.with_params({n: to_nearest(dense(program.params[n]), grid, torch.float32) for n in names})
    generator = torch.Generator().manual_seed(1)
    turned = {}
    for node in linears(n for n in program.nodes if n.block == 0):
        theta, alpha = torch.randn(2, program.params[node.params["weight"]].shape[0] // 2, generator=generator)
        turned[node.name] = Rotation("road_1", 32, theta / 2, 1 + alpha / 10)
    program = BankRoad((Road("x", turned),))(program)
    width = program.facts.hidden_size
    return model_of(BankPrompt((Prompt("p", torch.randn(3, width, generator=generator) * 0.1),))(program))


def compiled(wanted):
    """(variants, what stands in for their binaries on a card of cuda:90)"""
    variants = list({v.key(): v for ways in wanted.values() for way in ways for v in way}.values())
    took, made = Resources(32, 0, 0, 0, 0, 100, 0, 0, 0), []
    for i, variant in enumerate(variants):
        sizes = [{"i32": 4, "fp32": 4}.get(kind, 8) for _, kind in variant.params if kind != "none"]
        code = f"{','.join(map(str, [*sizes, 8, 8]))} #{i}".encode()
        target = named("cuda:90")
        binary = Binary(variant, target, code, "k", variant.warps, 0, (0, 128, 0), True, took, "3.7.1", "ab")
        made.append(Kept(binary, (("key", (0,)),)))
    return variants, made


@pytest.fixture
def card(model, fake_drivers, tmp_path, monkeypatch):
    """(the card, a way to open the model on it)"""
    monkeypatch.setattr("tpvc.compiler.backends.triton.ROWS", (1, 2))
    variants, made = compiled(candidates(model, CAPACITY))
    package.write(tmp_path / "kernels", made)
    kernels = package.read(tmp_path / "kernels")
    monkeypatch.delenv("FAKE_LOG", raising=False)
    device = driver.open_device(driver.open_api("cuda", fake_drivers["cuda"]))
    launcher = lambda stream: driver.launcher(kernels, device, stream)  # noqa: E731
    yield Card(fake_drivers["cuda"], variants), lambda: OnGpu(model, SLOTS, CAPACITY, device, launcher)
    ctypes.CDLL(fake_drivers["cuda"]).fake_listen(None)


def test_it_computes_what_the_kernels_do_on_tensors(card, model):
    """Bit for bit: two rows that come, go and draw, with an adapter, a task and both."""
    fake, opened = card
    found = []
    for compute in (opened(), OnTorch(model, SLOTS, CAPACITY, with_triton)):
        served, steps = Engine(compute), []
        a, logits = served.admit([5, 9, 33, 71, 12], "x")
        b, token = served.admit([7, 8], None, "p", "greedy")
        steps += [logits, token, served.decode([b, a], [int(token), 3])]
        draws = [Draw(0.9, 0.8, 0.7), Draw(0.5, 1.0, 0.1)]
        steps += [served.decode([a, b], [4, 6], "sample", draws), served.decode([b], [2], "greedy")]
        served.release(b)
        c, logits = served.admit([1, 2, 3], "x", "p")
        steps += [logits, served.decode([a, c], [8, 9])]
        found.append(steps)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    # passes: logits and tokens of a piece, logits and draws of two rows, a token of one; two came again as graphs
    assert len(fake.graphs) == 5 and fake.replayed == 2


def test_tiles_are_timed_there(card, model):
    fake, opened = card
    gpu = opened()
    _, choices = asked(model, CAPACITY, shapes_of((1,)), gpu.caches)
    turned = next(key for key in choices if "turn 32" in key[0])
    seen = next(key for key in choices if key[0].startswith("attention"))
    before = fake.launched
    found = tiles.chosen({key: choices[key] for key in (turned, seen)}, gpu.seconds)
    assert found.keys() == {turned, seen} and fake.launched > before
    assert found[seen] == next(iter(choices[seen]))
    gpu.tiles = found
    Engine(gpu).admit([1, 2, 3])


def test_tiles_without_a_binary_leave_no_memory(card, monkeypatch):
    gpu, taken = card[1](), []
    alloc, free = driver.Device.alloc, driver.Device.free
    monkeypatch.setattr(driver.Device, "alloc", lambda *given: taken.append(alloc(*given)) or taken[-1])
    monkeypatch.setattr(driver.Device, "free", lambda device, memory: taken.remove(memory) or free(device, memory))

    def work(run):
        x = torch.empty(4, 8, device="meta")
        run(Launch("pointwise:apply", (1, 1, 1), (x, None, x, 32, 1.0), {"KIND": "scale", "BLOCK": 7}))

    with pytest.raises(TpvcError, match="no binary of kernel"):
        gpu.seconds(work)
    assert sum(memory.size for memory in taken) == gpu.arena.size


def test_a_package_is_opened_on_the_card_that_there_is(tiny_llama, fake_drivers, tmp_path, monkeypatch):
    """From what is written to what `tpvc run` writes: the tokens of the references, but for sums in another order."""
    built = {}

    def build(wanted, targets, progress, store):
        built["variants"], kept = compiled(wanted)
        return Built(tuple(kept), ())

    monkeypatch.setattr("tpvc.compiler.backends.triton.ROWS", (1,))
    monkeypatch.setattr("tpvc.kernels.aot.build", build)
    monkeypatch.setattr("tpvc.compiler.backends.triton.tiles._best", lambda works, *_, **__: next(iter(works)))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda _: str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "LIBRARIES", {"cuda": (fake_drivers["cuda"],), "hip": ("none.so",)})
    monkeypatch.delenv("FAKE_LOG", raising=False)
    folder, program = tmp_path / "package", frontends.load(tiny_llama)
    folder.mkdir()
    triton.emit(program, folder, frontends.tokenizer(program), [named("cuda:90")], torch.float32, capacity=CAPACITY)
    fake = Card(fake_drivers["cuda"], built["variants"])
    try:
        assert driver.present() == "cuda"
        written, told = [], []
        for device in ("auto", "cpu"):
            engine = open_engine(str(folder), 1, device=device, progress=lambda *now: told.append(now))
            written.append(list(engine.generate([5, 9, 33], 3, stop=False)))
        assert written[0] == written[1] and fake.replayed == 1  # a prompt, a token, and that graph once more
        assert list((tmp_path / "cache" / "tiles").glob("*.json"))
        assert told[0][:2] == ("tiles", 0) and told[-1][1] == told[-1][2] > 1
        again: list[tuple] = []
        open_engine(str(folder), 1, device="cuda", progress=lambda *now: again.append(now))
        assert not again, "what was timed is read from its file"
    finally:
        ctypes.CDLL(fake_drivers["cuda"]).fake_listen(None)


@pytest.mark.parametrize("adapter", [None, "x"])
def test_a_text_ends_where_its_task_leaves_no_room(tiny_llama, tmp_path, monkeypatch, adapter):
    """Virtual tokens take positions of the context, and places of the cache where an adapter turns them."""
    program = frontends.load(tiny_llama)
    turned = {n.name: Rotation("road_1", 32, torch.zeros(32), torch.ones(32)) for n in linears(program.nodes)[:1]}
    prompt = Prompt("p", torch.zeros(3, program.facts.hidden_size))
    program = BankPrompt((prompt,))(BankRoad((Road("x", turned),))(program))
    monkeypatch.setattr("tpvc.kernels.aot.build", lambda *_, **__: Built((), ()))
    triton.emit(program, tmp_path, frontends.tokenizer(program), [named("cuda:90")], torch.float32)
    opened = open_engine(str(tmp_path), 1, adapter, "p", "cpu")
    assert opened.context_length == program.facts.context_length - 3
    text = list(range(250))
    assert len(list(opened.generate(text, room(opened.context_length, text, 99), stop=False))) == 3
    assert open_engine(str(tmp_path), 1, adapter, None, "cpu").context_length == program.facts.context_length


def test_what_is_compiled_does_not_depend_on_where_a_file_has_its_tensors(tiny_llama, tmp_path):
    """Tensors read from a file lie at any address there; on a card they are aligned."""
    program = frontends.load(tiny_llama)
    shifted = {"a": torch.zeros(1, dtype=torch.uint8)} | {n: dense(t) for n, t in program.params.items()}
    rest = torch.frombuffer(bytearray(8 * sum(t.nbytes for t in shifted.values())), dtype=torch.uint8)
    moved, at = {}, 4
    for name, tensor in shifted.items():
        moved[name] = rest[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        at += -(-tensor.nbytes // 16) * 16
    moved.pop("a")
    assert all(t.data_ptr() % 16 for t in moved.values())
    made = [candidates(model_of(program.with_params(p)), CAPACITY, (1,)) for p in ({}, moved)]
    assert made[0] == made[1]


def test_a_pass_is_only_kernels():
    x = torch.empty(4, 8, device="meta")
    launches, out = recorded(lambda run: pointwise.pointwise(x.view(2, 16), None, 2.0, kind="scale", run=run))
    assert [launch.kernel for launch in launches] == ["pointwise:apply"] and out.shape == (2, 16)
    with pytest.raises(AssertionError, match="mul is computed outside a kernel"):
        recorded(lambda run: x * 2)


def test_an_arena_holds_what_lives_and_no_more():
    """a -> b -> c -> d, and a sum of b and d: a's place is free for c, and c's for the sum."""

    def work(run):
        a = torch.empty(1000, device="meta")
        b, c, d = (torch.empty(1000, device="meta") for _ in range(3))
        for one, other in ((a, b), (b, c), (c, d)):
            run(Launch("x", (1, 1, 1), (one, other), {}))
        e = pointwise.pointwise(b, d, kind="add", run=run)
        kept.extend((a, b, c, d, e))
        return e

    kept = []
    launches, result = recorded(work)
    found = arena(launches, {}, result)
    places = [found.places[key_of(t)] for t in kept]
    size = 4096
    assert found.size == 3 * size and places == [0, size, 0, 2 * size, 0]
    # nothing that is in use at once lies in one place
    lives = [(0, 0), (0, 3), (1, 2), (2, 3), (3, 4)]
    for i, (p, (a, b)) in enumerate(zip(places, lives, strict=True)):
        for q, (c, d) in list(zip(places, lives, strict=True))[:i]:
            assert p != q or b < c or d < a


def test_rows_are_those_that_a_package_has():
    assert engine.ROWS[0] == 1 and all(b == 2 * a for a, b in zip(engine.ROWS, engine.ROWS[1:], strict=False))
