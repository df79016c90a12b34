"""What every room's tests may ask for. No test needs a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported; builds ahead of time run in processes without
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread costs more than it brings

import pytest

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Numbers such as 0, 1, 2 and 144 are written with digits; words are not.",
    "def area(width, height):\n    return width * height\n",
    "Wer früh aufsteht, sieht den Tag beginnen; qui dort longtemps rêve longtemps.",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A command that was given more threads leaves them set in this process."""
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fake_drivers(tmp_path_factory):
    """{"cuda", "hip", "old"}: paths of libraries that stand in for GPU drivers, made from `fake_driver.c`."""
    import shutil
    import subprocess
    from pathlib import Path

    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or os.name == "nt":
        pytest.skip("no C compiler to make the fake drivers with")
    folder, source = tmp_path_factory.mktemp("drivers"), Path(__file__).with_name("fake_driver.c")
    for name, flags in {"cuda": (), "hip": ("-DHIP",), "old": ("-DOLD",)}.items():
        command = [compiler, "-shared", "-fPIC", "-w", *flags, "-o", f"{folder / name}.so", f"{source}"]
        subprocess.run(command, check=True)
    return {name: f"{folder / name}.so" for name in ("cuda", "hip", "old")}


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of at most 384 entries, with a chat template, end of text 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=special[0], eos_token=special[1], pad_token=special[0]
    )
    wrapped.chat_template = CHAT
    return wrapped


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer):
    """Directory of a random Llama with two blocks: 64 features, 128 inside, 2 of 4 heads for keys, untied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def write_adapter():
    """write_adapter(model, directory, seed=0): a random RoAd adapter of all linears of the blocks, in PEFT's format."""
    import torch

    from tpvc.compiler import frontends
    from tpvc.compiler.adapters import road_files
    from tpvc.compiler.adapters.road import Road, Rotation
    from tpvc.compiler.program import linears

    def write(model, directory, seed=0):
        program, generator = frontends.load(model), torch.Generator().manual_seed(seed)
        rotations = {}
        for node in linears(n for n in program.nodes if n.block is not None):
            theta, alpha = torch.randn(2, program.params[node.params["weight"]].shape[0] // 2, generator=generator)
            rotations[node.name] = Rotation("road_1", 8, theta / 2, 1 + alpha / 10)
        road_files.write(Road(directory.name, rotations), directory, program, {})
        return directory

    return write
