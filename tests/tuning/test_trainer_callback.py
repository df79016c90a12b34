"""The penalty in transformers' own Trainer, against the same two steps by hand."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from tpvc.compiler import frontends
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning import importance_file
from tpvc.compiler.tuning.lora_space import A, B
from tpvc.compiler.tuning.space import make_space
from tpvc.compiler.tuning.trainer_callback import PenaltyCallback

RATE, PHI = 0.05, 3.0
ROWS = [{"input_ids": (x := torch.arange(3 + i, 19 + i)), "labels": x} for i in range(8)]


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def importance_of(tmp_path):
    """importance_of(model, train) -> (path, space at theta*): random importance, theta* a little off the model."""

    def make(model, train):
        program = frontends.load(model)
        space = make_space(program, train, "all-linear", 4, 0)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in space.params.values():
                p.add_(torch.randn(p.shape, generator=draw), alpha=0.01)
        omega = {n: torch.rand(space.value(n).shape, generator=draw).pow(4) for n in space.layers}
        about = {"method": "path", "base": None, "train": train, "targets": "all-linear", "rank": 4}
        importance_file.write(tmp_path / "i", omega, space, space.params, "normalised", about)
        return tmp_path / "i", space

    return make


def model_of(directory, train):
    model = AutoModelForCausalLM.from_pretrained(directory).float()
    if train == "weights":
        return model
    named = "all-linear" if train == "lora" else train
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=named, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def train(model, file, phi, out, steps=2, **options):
    """Plain gradient descent at a constant rate, not clipped; the named parameters and the logs."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0} | options
    args = TrainingArguments(
        out,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, callbacks=[PenaltyCallback(file, phi)])
    trainer.train()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, trainer.state.log_history


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_two_steps_on_weights(request, name, importance_of, tmp_path):
    """From theta* the first step is the same with any phi; the second differs by the rate times the penalty's gradient.

    theta_2 is off by 2^-24 of itself.
    """
    model = request.getfixturevalue(name)
    file, space = importance_of(model, "weights")
    once, _ = train(model_of(model, "weights"), file, PHI, tmp_path / "o", steps=1)
    plain, _ = train(model_of(model, "weights"), file, 0.0, tmp_path / "o")
    held, logs = train(model_of(model, "weights"), file, PHI, tmp_path / "o")
    found = importance_file.read(file)
    total = 0.0
    for protected in space.layers:
        conv = name == "tiny_gpt2"
        first, a, b = (x[protected].T if conv else x[protected] for x in (once, plain, held))
        moved = first - space.value(protected)
        assert moved.any()
        weighted = found.coefficients[protected] * found.omega[protected].dense * moved
        total += float((weighted * moved).double().sum())
        difference, wanted = b - a, -RATE * 2 * PHI * weighted
        assert float((difference - wanted).abs().max()) <= 2**-21 * float(a.abs().max())
        assert float(wanted.abs().max()) > 2**-16 * float(a.abs().max())
    told = [entry["penalty"] for entry in logs if "penalty" in entry]
    assert told == [0, pytest.approx(PHI * total, rel=1e-4)]


def test_two_steps_on_lora(tiny_llama, importance_of, tmp_path):
    """dR/dB = s D A^T and dR/dA = s B^T D, D of the update behind the first step."""
    file, space = importance_of(tiny_llama, "lora")
    once, _ = train(model_of(tiny_llama, "lora"), file, PHI, tmp_path / "o", steps=1)
    plain, _ = train(model_of(tiny_llama, "lora"), file, 0.0, tmp_path / "o")
    held, _ = train(model_of(tiny_llama, "lora"), file, PHI, tmp_path / "o")
    found = importance_file.read(file)
    for target in space.layers:
        names = [f"base_model.model.{target}.lora_{part}.default.weight" for part in "AB"]
        a, b = (once[n] for n in names)
        d = 2 * PHI * found.coefficients[target] * found.omega[target].dense
        d = d * (2 * (b @ a) - space.value(target))
        for n, wanted, start in ((names[0], 2 * b.T @ d, A), (names[1], 2 * d @ a.T, B)):
            assert float((held[n] - plain[n] + RATE * wanted).abs().max()) <= 2**-18 * float(plain[n].abs().max())
            assert not torch.equal(held[n], plain[n]) and not torch.equal(once[n], space.params[target + start])


def test_a_strong_penalty_holds_the_model_and_goes_on_from_a_checkpoint(tiny_llama, importance_of, tmp_path):
    file, space = importance_of(tiny_llama, "weights")
    far, near = (train(model_of(tiny_llama, "weights"), file, phi, tmp_path / "o", steps=20)[0] for phi in (0.0, 2.0))
    gone = [sum(float((x[n] - space.value(n)).square().sum()) for n in space.layers) for x in (far, near)]
    assert gone[1] < 0.9 * gone[0]
    model = model_of(tiny_llama, "weights")
    callback = PenaltyCallback(file, 1.0)
    args = type("Args", (), {"fp16": False})()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    callback.on_train_begin(args, type("State", (), {"global_step": 5})(), None, model=model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_it_refuses(tiny_llama, importance_of, tmp_path):
    file, _ = importance_of(tiny_llama, "weights")
    with pytest.raises(TpvcError, match="phi is -1"):
        PenaltyCallback(file, -1.0)
    with pytest.raises(TpvcError, match="there is no file"):
        PenaltyCallback(tmp_path / "nowhere", 1.0)
    with pytest.raises(TpvcError, match="has no parameter"):
        train(model_of(tiny_llama, "lora"), file, 1.0, tmp_path / "o")
    model = model_of(tiny_llama, "weights")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(TpvcError, match="not trained"):
        train(model, file, 1.0, tmp_path / "o")
    file, _ = importance_of(tiny_llama, "lora")
    with pytest.raises(TpvcError, match=r"alpha / r = 0.5; expected 2"):
        config = peft.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
        train(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config), file, 1.0, tmp_path / "o")
    file, _ = importance_of(tiny_llama, "road_1")
    with pytest.raises(TpvcError, match="the importance is of 'road_1'"):
        train(model_of(tiny_llama, "weights"), file, 1.0, tmp_path / "o")
