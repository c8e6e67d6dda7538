"""`dist-adv eval --model`: anybody's network, in a folder of its own, on colour images."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attacked_by_ranks
import dist_adv
import fakes
import forked
import theirs
from dist_adv import cli, plugins, rng
from dist_adv.config import EvalOptions, Judged, Reference, ThreatOptions, load, parse_config
from dist_adv.evaluation.attacks import Noise
from dist_adv.evaluation.doubts import doubts
from dist_adv.evaluation.images import subset
from dist_adv.evaluation.results import Result
from dist_adv.judging import claims, measurement, thorough
from dist_adv.judging.network import GROUP, Program, load_network
from dist_adv.models import build_model, load_model, save_model
from dist_adv.runs.folder import RunFolder

DATA = ["data.name=theirs:Reds", "threat.eps=0.1"]
Run = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    """AutoAttack is itself, of fewer steps and queries."""
    with attacked_by_ranks.short(steps=5, queries=50):
        yield


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judged(model: str, *arguments: str, out: str = "out") -> Run:
    """Judge a network; return the lines of its results by attack, the last of each."""
    assert cli._run(["eval", "--model", model, "--out", out, *DATA, *arguments]) == 0
    return results(out)


def results(out: str) -> Run:
    lines = map(json.loads, Path(out, "results.jsonl").read_text().splitlines())
    return {line["attack"]: line for line in lines}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli._run(["eval", *arguments]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dist-adv: ")
    return line


def test_a_network_is_judged(said: pytest.LogCaptureFixture) -> None:
    """Against an independent count and Python's own call; later attacks are added."""
    found = judged("theirs:Red", "--model-args", "strength=10", "--attacks", "pgd-3", "--limit=90")
    images, labels, _ = theirs.Reds(theirs.Reds.Options(name="a")).load("test")
    images = (images * 255).round() / 255
    red = images[:, 0].mean((1, 2), keepdim=True)[:, :, 0]
    right = (red - torch.tensor([0.2, 0.5, 0.8])).abs().argmin(1) == labels
    everything = judged("theirs:Red", "--model-args", "strength=10")
    assert everything["natural"]["correct"] == right.sum() < everything["natural"]["n"] == 150
    assert found["natural"]["n"] == found["pgd-3"]["n"] == 90
    assert not found["natural"]["flags"]
    net, threat = theirs.Red(10), dist_adv.Linf(0.1)
    same = dist_adv.evaluate(net, (images, labels), threat=threat, attacks=["pgd-3"], limit=90)
    assert 0 < found["pgd-3"]["correct"] == same["pgd-3"].correct < found["natural"]["correct"]
    assert cli._run(["eval", "out", "--attacks", "fgsm", "threat.eps=0.05"]) == 0
    assert results("out")["fgsm"]["eps"] == 0.05
    written = load(Path("out", "judged.yaml"), [], Judged)
    assert (written.model.reference, written.model.args) == ("theirs:Red", {"strength": 10})
    assert written.threat.eps == 0.1
    about = json.loads(Path("out", "env.json").read_text())
    assert about["weights"] == found["natural"]["weights"]
    assert torch.__version__.startswith(about["torch"])


def test_two_ranks_and_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks count what one does; what one has done is not done again by two."""
    one = judged("theirs:Red", "--attacks", "pgd-5", "eval.batch_size=20")

    def cut(*given: object) -> None:
        raise KeyboardInterrupt

    arguments = ["--attacks", "pgd-5", "eval.batch_size=10"]
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "write_results", cut)
        assert cli._run(["eval", "--model", "theirs:Red", "--out", "two", *DATA, *arguments]) == 130
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["dist_adv", "eval", "two", *arguments]
    monkeypatch.setenv("PYTHONPATH", str(Path(theirs.__file__).parent))
    done = forked.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "going on after 150 images" in done.stdout + done.stderr
    assert cli._run(["claim", "two"]) == 0
    at = command.index("eval")
    command[at:] = ["claim", "--check", "two/claim.json"]
    done = forked.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the claim holds") == 1
    two = results("two")
    for attack in ("natural", "pgd-5"):
        assert two[attack]["correct"] == one[attack]["correct"]
    assert not list(Path("two").glob("unfinished-*"))


def saved_folder() -> str:
    """An export of one of dist_adv's own networks."""
    options = parse_config(
        {"method": {"name": "natural"}, "model": {"name": "preact_resnet18", "width": 4}}, "here"
    ).model
    model = build_model(options, [0.5] * 3, [0.25] * 3, ["a", "b", "c"], 0)
    Path("saved").mkdir()
    save_model(Path("saved", "model.safetensors"), model.architecture, model.state_dict())
    return "saved"


def torchscript() -> str:
    torch.jit.script(load_model(saved_folder())).save("script.pt")
    return "script.pt"


def exported() -> str:
    model, image = load_model(saved_folder()), torch.rand(2, 3, 8, 8)
    dynamic = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(model, (image,), dynamic_shapes=dynamic), "program.pt2")
    return "program.pt2"


@pytest.mark.parametrize("make", [torchscript, exported])
def test_programs_that_torch_saved_are_judged_as_their_network(make: Any) -> None:
    attacks = ["--attacks", "pgd-3", "--limit", "60"]
    program = judged(make(), *attacks)
    network = judged("saved", *attacks, out="network")
    assert program["natural"]["correct"] == network["natural"]["correct"]
    assert abs(program["pgd-3"]["correct"] - network["pgd-3"]["correct"]) <= 1  # of 60: rounding
    assert program["natural"]["loss"] == pytest.approx(network["natural"]["loss"], rel=1e-5)


def test_a_program_has_no_mode() -> None:
    exported()
    program = Program(torch.export.load("program.pt2"))
    assert not program.eval().training


@pytest.mark.parametrize("model", ["theirs:shared_out", "theirs:half", "theirs:READY"])
def test_other_wrappings(model: str) -> None:
    """Of DataParallel, in half precision, made already: judged as the network in fp32."""
    network = load_network(Reference(reference=model))
    assert [type(each).__name__ for each in network.modules()] == ["Contiguous", "Red"]
    assert {each.dtype for each in network.parameters()} == {torch.float32}
    assert judged(model, "--limit", "60")["natural"]["correct"] > 40


def test_timm_normalises_inside(said: pytest.LogCaptureFixture) -> None:
    arguments = ["num_classes=3", "pretrained=false", "in_chans=3"]
    given = [part for each in arguments for part in ("--model-args", each)]
    judged("timm:test_resnet", *given, "--attacks", "natural", "--limit", "10")
    weights = json.loads(Path("out", "env.json").read_text())["weights"]
    assert len(weights) == 64


DOUBTS = {
    "probabilities": "the outputs are probabilities and no logits",
    "normalised_outside": "are right normalised by the data's mean and deviation",
    "normalises_twice": "as if it were done twice",
    "bytes_wanted": "are right from 0 to 255",
    "from_minus_one": "put into the network what prepares them",  # normalised is as good
    "blue_first": "with their channels in reverse",
    "noisy": "not deterministic (two passes differ by",
    "no_numbers": "150 of 150 images get logits that are not finite",
    "of_the_batch": "depends on the others of its batch",
    "Stubborn": "1 layers train in spite of eval mode (BatchNorm1d)",
}


@pytest.mark.parametrize("name", DOUBTS)
def test_what_looks_wrong_is_said_beside_the_figure(
    name: str, said: pytest.LogCaptureFixture
) -> None:
    flags = judged(f"theirs:{name}", "--attacks", "natural")["natural"]["flags"]
    assert any(DOUBTS[name] in flag for flag in flags), flags
    assert said.text.count(DOUBTS[name]) == 1


def test_no_doubts_about_honest_networks() -> None:
    images, labels, names = theirs.Reds(theirs.Reds.Options(name="a")).load("test")
    data = dist_adv.data.of_tensors("reds", images, labels, names)
    dropout = nn.Sequential(theirs.Red(), nn.Dropout(0.5), nn.BatchNorm1d(3))
    for network in (
        theirs.Red(),
        dropout,
        theirs.Around(after=lambda x: x.log_softmax(1)),
    ):
        assert doubts(network.train(), data, EvalOptions(batch_size=40)) == []
        assert not network.training


BAD = {
    "theirs:nonesuch": "cannot be imported",
    "nomodule:make": "cannot be imported",
    "theirs:NUMBER": "is an object of builtins.int",
    "theirs:nothing": "returns an object of builtins.NoneType, not a torch.nn.Module",
    "theirs:raises": "theirs.py, line",
    "theirs:fails": "--model: it fails on images of shape (2, 3, 8, 8)",
    "theirs:a_pair": "--model: it returns tuple",
    "theirs:five_classes": "returns (2, 5) for 2 images of 3 classes",
    "nowhere.pt": "no such file or folder",
    "empty": "no such weights file",
    "page.pt": "is a web page",
    "weights.pt": "neither TorchScript nor torch.export's",
    "torn.pt": "neither TorchScript nor torch.export's",
    "torn.pt2": "it cannot be loaded",
    "timm:nonesuch": "Unknown model",
}


@pytest.mark.parametrize("model", BAD)
def test_what_is_no_network(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("page.pt").write_text(" <!DOCTYPE html><html><title>Google Drive - Virus scan warning")
    torch.save(theirs.Red().state_dict(), "weights.pt")
    Path("torn.pt").write_bytes(Path("weights.pt").read_bytes()[:200])
    Path("torn.pt2").write_bytes(Path("weights.pt").read_bytes()[:200])
    assert BAD[model] in refused(capsys, "--model", model, "--out", "out", *DATA)
    assert not Path("out").exists()


def test_folders_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    judged("theirs:unseeded", "--attacks", "natural", "--limit", "5")
    before = Path("out", "results.jsonl").read_bytes()
    mine = ["--model", "theirs:Red", "--out"]
    assert "is of another network (model.reference:" in refused(capsys, *mine, "out", *DATA)
    assert "the network's weights changed since it was judged" in refused(capsys, "out")
    assert "is of another network (model.args.x" in refused(capsys, "out", "model.args={x: 1}")
    assert Path("out", "results.jsonl").read_bytes() == before
    Path("notes").mkdir()
    assert "or a network with --model" in refused(capsys, "notes", *DATA)
    Path("notes", "notes").touch()
    assert "is not empty and nothing was judged" in refused(capsys, *mine, "notes", *DATA)
    assert "'strength' is no argument" in refused(capsys, *mine, "new", "--model-args", "strength")
    wrong = refused(capsys, *mine, "new", "--model-args", "sharpness=1", *DATA)
    assert "unexpected keyword argument 'sharpness'" in wrong
    assert "train: unknown key" in refused(capsys, *mine, "new", *DATA, "train.epochs=3")
    about = Path("out", "env.json")
    about.write_text(about.read_text().replace('"weights"', '"weight"'))
    assert "weights changed since it was judged there (None -> " in refused(capsys, "out")
    about.write_text("{")
    assert "env.json: not valid JSON" in refused(capsys, "out")
    assert "did you mean 'autoattack'" in refused(
        capsys, *mine, "new", *DATA, "--attacks", "autoatack"
    )
    for wrong in ([], ["out", "--model-args", "strength=1"]):
        assert cli._run(["eval", *wrong]) == 2
    assert "--model" in capsys.readouterr().err
    assert not Path("new").exists()


def test_its_place_is_called_as_it_is() -> None:
    assert cli._run(["eval", "--model", "theirs:Red", *DATA, "--attacks", "natural"]) == 0
    assert results("judged/theirs-Red")["natural"]["n"] == 150


def test_noise_is_the_worst_of_ten_points_of_the_ball() -> None:
    found = judged("theirs:Red", "--attacks", "noise", "threat.eps=0.2", "--limit", "60")
    images, labels, names = theirs.Reds(theirs.Reds.Options(name="a")).load("test")
    data = dist_adv.data.of_tensors("reds", images, labels, names)
    order = subset(len(data), 60)
    x, y = data.images[order] / 255, data.labels[order]
    keys = rng.sample_keys(rng.stream_key(0, "attack"), order)
    threat, net = dist_adv.Linf(0.2), theirs.Red()
    right = net(x).argmax(1) == y
    for draw in range(10):
        delta = threat.random(rng.substream(keys, f"noise {draw}"), x.shape)
        right &= net((x + delta).clamp(0, 1)).argmax(1) == y
    assert found["noise"]["correct"] == right.sum()
    assert found["noise"]["draws"] == 10


def test_square_alone_is_autoattacks() -> None:
    found = judged("theirs:Red", "--attacks", "pgd-10,square", "--limit", "20")
    assert found["square"]["attacks"] == ["square"]
    assert found["square"]["version"] == "custom"
    assert found["pgd-10"]["correct"] <= found["square"]["correct"] <= found["natural"]["correct"]


def test_targeted_apgd_of_three_classes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "theirs:Red", "--out", "out", *DATA]
    said = refused(capsys, *model, "--attacks", "apgd-t", "--limit", "20")
    assert "apgd-t: needs four classes or more; this model has 3" in said


QUICK = ["natural", "noise", "fgsm", "pgd-10", "pgd-20", "pgd-50-10", "given:transfer"]


def examined(network: nn.Module, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    """Examine a network by these attacks of an examination, of 40 images."""

    def chosen(*given: Any) -> list[thorough.Part]:
        return [part for part in parts(*given) if set(part.attacks) <= {*QUICK, *more}]

    parts = thorough._parts
    monkeypatch.setattr(thorough, "_parts", chosen)
    monkeypatch.setattr(theirs, "READY", network)
    out = ["--out", f"out-{len(list(Path().glob('out*')))}"]
    command = ["eval", "--model", "theirs:READY", *out, *DATA, "threat.eps=0.2", "--thorough"]
    command += ["--limit", "40"]
    plugins._FOUND.pop((GROUP, "theirs:READY"), None)
    assert cli._run([*command, "--second", "theirs:Red"]) == 0
    return json.loads(Path(out[1], "thorough.json").read_text())


def test_an_honest_network_is_consistent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examined(theirs.Red(), monkeypatch, "square", "autoattack")
    assert (found["verdict"], found["because"]) == ("consistent", [])
    figures = found["figures"]
    assert list(figures)[:7] == [
        "natural", "noise", "fgsm", "pgd-10", "pgd-50-10", "pgd-50-10, margin", "pgd-50-10, dlr"
    ]  # fmt: skip
    assert list(figures)[7:] == [
        "pgd-10, another seed", "square", "autoattack", "transfer", "pgd-20, eps 102/255",
    ]  # fmt: skip
    assert figures["pgd-50-10, margin"]["loss_fn"] == "margin"
    assert figures["pgd-10, another seed"]["seed"] == 1
    assert figures["pgd-20, eps 102/255"]["correct"] == 0
    assert figures["autoattack"]["correct"] <= figures["pgd-50-10"]["correct"]
    assert found["alignment"] > 0.9
    out = capsys.readouterr().out
    assert "consistent: nothing here" in out


FAKES = {
    "quantised": "the input gradient is exactly 0 for 100%",
    "resized": "the output is not deterministic",
    "saturated": "the input gradient is exactly 0 for",
    "without_gradient": "are right within eps 0.5",
    "misled": "transfer leaves",
}


@pytest.mark.parametrize("kind", FAKES)
def test_fakes_are_suspicious(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(fakes.Fake(theirs.Red(), fakes.KINDS[kind]), monkeypatch)
    assert found["verdict"] == "suspicious"
    assert any(FAKES[kind] in reason for reason in found["because"]), found["because"]
    assert sum("exactly 0" in reason for reason in found["because"]) <= 1


def test_who_knows_the_attacks_seed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    images = theirs.Reds(theirs.Reds.Options(name="a")).load("test")[0]
    images = (images * 255).round() / 255
    network = fakes.Memoriser(theirs.Red(), images, torch.arange(len(images)), dist_adv.Linf(0.2))
    found = examined(network, monkeypatch)
    assert any("knows the attack's random numbers" in each for each in found["because"]), found


def test_an_examination_goes_on_where_it_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = examined(theirs.Red(), monkeypatch)

    def cut(*given: object) -> None:
        raise KeyboardInterrupt

    command = ["eval", "--model", "theirs:Red", "--out", "cut", *DATA, "threat.eps=0.2"]
    command += ["--thorough", "--limit", "40"]
    with monkeypatch.context() as patch:
        patch.setattr(thorough, "_alignment", cut)
        assert cli._run(command) == 130
    with monkeypatch.context() as patch:
        patch.setattr(Noise, "__call__", cut)
        assert cli._run(command) == 0
    found = json.loads(Path("cut", "thorough.json").read_text())["figures"]
    for name, figure in found.items():
        assert (name, figure["correct"]) == (name, whole["figures"][name]["correct"])
    assert not list(Path("cut").glob("unfinished-*"))


def stopped(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """Interrupt a command when everything is measured and nothing is written."""

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(thorough, "_alignment", stop)
        patch.setattr(measurement, "write_results", stop)
        assert cli._run(["eval", *command]) == 130


def test_another_second_network_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*given: Any) -> list[thorough.Part]:
        return [part for part in parts(*given) if set(part.attacks) <= set(QUICK)]

    parts = thorough._parts
    monkeypatch.setattr(thorough, "_parts", chosen)
    mirrored = theirs.Red()
    mirrored.centres.data = mirrored.centres.data.flip(0)  # whose images are less of a danger
    monkeypatch.setattr(theirs, "READY", mirrored)
    plugins._FOUND.pop((GROUP, "theirs:READY"), None)
    shared = ["--model", "theirs:Red", *DATA, "threat.eps=0.2", "--thorough", "--limit", "40"]
    stopped(monkeypatch, *shared, "--out", "out", "--second", "theirs:READY")
    left = []
    for out in ("out", "fresh"):
        assert cli._run(["eval", *shared, "--out", out, "--second", "theirs:Red"]) == 0
        figures = json.loads(Path(out, "thorough.json").read_text())["figures"]
        left.append(figures["transfer"]["correct"])
    assert left[0] == left[1]


def test_an_attack_with_other_options_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = ["--attacks", "theirs:Darker"]
    strong = 'eval.attack_options={"theirs:Darker": {strong: true}}'
    stopped(monkeypatch, "--model", "theirs:Red", "--out", "out", *DATA, *attack)
    found = judged("theirs:Red", *attack, strong)
    assert found["theirs:Darker"]["correct"] < found["natural"]["correct"]
    assert found["theirs:Darker"]["options"] == {"strong": True}


def test_pictures_are_of_the_folders_own_ball() -> None:
    judged("theirs:Red", "--attacks", "pgd-3", "--limit", "20")
    pictures = Path("out", "examples.safetensors")
    before = pictures.read_bytes()
    assert cli._run(["eval", "out", "--attacks", "pgd-3", "threat.eps=0.3"]) == 0
    assert pictures.read_bytes() == before
    assert cli._run(["eval", "out", "--attacks", "fgsm"]) == 0
    assert pictures.read_bytes() != before


def test_the_widest_ball_is_that_in_which_images_become_grey() -> None:
    for norm, radius in (("linf", 0.5), ("l2", 27.7)):
        widest = thorough._widest(norm, 3 * 32 * 32)
        *_, last = thorough._parts(ThreatOptions(norm=norm, eps=0.4), 0, 3, None, widest)
        assert last.eps == pytest.approx(radius, abs=0.05)


def test_what_goes_with_thorough(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--thorough", "--attacks", "fgsm"], ["--second", "theirs:Red"]):
        assert cli._run(["eval", "--model", "theirs:Red", *wrong]) == 2
    assert "leave --attacks out" in capsys.readouterr().err
    said = refused(
        capsys, "--model", "theirs:Red", *DATA, "--thorough", "--second", "theirs:a_pair"
    )
    assert "--second: it returns tuple" in said


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli._run(["claim", *arguments]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dist-adv: ")
    return line


@pytest.fixture
def claimed() -> Path:
    """The claim of a network that was judged by three attacks."""
    judged("theirs:Red", "--attacks", "fgsm,pgd-5", "threat.eps=0.15")
    judged("theirs:Red", "--attacks", "pgd-5-2", "threat.eps=0.15", "--limit", "90")
    assert cli._run(["claim", "out"]) == 0
    return Path("out", "claim.json")


def test_a_claim_holds(claimed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli._run(["claim", "--check", str(claimed), "--limit", "60"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "the file is as it was written", "the weights are the same", "the test images are the same"
    ]  # fmt: skip
    assert {line.split(":")[0] for line in out[3:-1]} == {"natural", "fgsm", "pgd-5", "pgd-5-2"}
    assert out[-1] == "the claim holds"
    stated = json.loads(claimed.read_text())
    lines = [json.loads(line) for line in Path("out", "results.jsonl").read_text().splitlines()]
    assert all(figure in lines for figure in stated["figures"])
    assert stated["data"]["images"] == 150
    page = claimed.with_suffix(".md").read_text()
    for text in ("linf 0.15", "| pgd-5-2 |", stated["network"]["sha256"], *stated["commands"]):
        assert text in page


def test_a_claims_commands_measure_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its own loss, seed, step size and number of images."""
    settings = ["data.images=120", "threat.norm=l2", "threat.eps=1.5"]
    judged("theirs:Red", "--model-args", "strength=10", *settings, "--attacks", "pgd-3")
    others = ["eval.loss=margin", "eval.seed=3", "eval.step_size=0.02", "--limit", "50"]
    others.append('eval.attack_options={"theirs:Darker": {strong: true}}')
    assert cli._run(["eval", "out", "--attacks", "fgsm,pgd-4,theirs:Darker", *others]) == 0
    assert cli._run(["claim", "out"]) == 0
    assert cli._run(["claim", "--check", "out/claim.json"]) == 0
    stated = json.loads(Path("out", "claim.json").read_text())
    for command in stated["commands"]:
        assert cli._run([*shlex.split(command)[1:], "--out", "again"]) == 0
    again = results("again")
    assert len(again) == len(stated["figures"]) == 5
    for figure in stated["figures"]:
        for key in figure.keys() - {"seconds", "time"}:
            assert (key, again[figure["attack"]][key]) == (key, figure[key])


@pytest.mark.parametrize(
    ("n", "ends"), [(100, "eval.limit=null"), (50, "--limit 50"), (60, "--limit 60")]
)
def test_a_claims_command_is_of_as_many_images(n: int, ends: str, tmp_path: Path) -> None:
    """Whatever the run's own limit is."""
    tree = {"method": {"name": "fast"}, "eval": {"limit": 50}}
    subject = claims.Subject(RunFolder(tmp_path), parse_config(tree, "test"))
    assert subject.command([{"attack": "natural", "n": n}], images=100).endswith(ends)


@pytest.mark.parametrize(("right", "believed"), [(4321, True), (2303, False)])
def test_autoattack_leaves_a_little_less_on_honest_networks(right: int, believed: bool) -> None:
    """Wong et al. 2020: 46.06 and 43.21 % of 10,000, whose intervals are apart."""
    counts = {"natural": 8334, "pgd-10": 4700, "pgd-10, another seed": 4700}
    counts |= {"pgd-50-10": 4606, "autoattack": right}
    figures = {
        name: Result(name, correct, 10_000, None, 1.0, name, {}, [])
        for name, correct in counts.items()
    }
    assert (not thorough.Examined(figures, alignment=0.9, doubtful=[]).reasons()) == believed


def test_a_claim_states_the_verdict_on_its_own_weights_and_images_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examined(theirs.Red(), monkeypatch)
    assert cli._run(["eval", "out-0", "--attacks", "fgsm"]) == 0
    about = Path("out-0", "thorough.json")
    found = json.loads(about.read_text())
    verdicts = []
    others = [{"weights": "f" * 64}, {"threat": {"norm": "linf", "eps": 0.1}}]
    others += [{"dataset": "others"}, {"images": {"size": [99, 99]}}]
    for changes in ({}, *others):
        about.write_text(json.dumps(found | changes))
        assert cli._run(["claim", "out-0"]) == 0
        verdicts.append(json.loads(Path("out-0", "claim.json").read_text())["examined"])
    assert verdicts == ["consistent", None, None, None, None]


def test_a_claim_that_was_tampered_with_falls(
    claimed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A figure; a figure and the checksum; another network; other images."""
    check = ("--check", str(claimed))
    content = json.loads(claimed.read_text())
    (pgd,) = (each for each in content["figures"] if each["attack"] == "pgd-5")
    pgd["accuracy"] += 0.15
    claimed.write_text(json.dumps(content))
    assert cli._run(["claim", *check]) == 2
    assert "was edited after it was written" in capsys.readouterr().err
    forged = claims.Claim.model_validate(content)
    forged.sha256 = forged.checksum()
    claimed.write_text(forged.model_dump_json())
    assert "does not hold: pgd-5:" in failed(capsys, *check)
    assert "does not hold: the test images are others" in failed(capsys, *check, "data.images=120")
    about = Path("out", "judged.yaml")
    about.write_text(about.read_text().replace("theirs:Red", "theirs:unseeded", 1))
    assert "does not hold: the weights are others" in failed(capsys, *check)


def test_what_is_no_claim(capsys: pytest.CaptureFixture[str]) -> None:
    def no(*arguments: str) -> str:
        capsys.readouterr()
        assert cli._run(["claim", *arguments]) == 2
        return capsys.readouterr().err

    judged("theirs:Red", "--attacks", "natural")
    assert "threat.eps: 0.1 -> 0.2 is none of a claim's" in no("out", "threat.eps=0.2")
    assert "no attack was run" in no("out")
    Path("empty").mkdir()
    assert "is no run folder" in no("empty")
    Path("note.json").write_text("{}")
    assert "is no claim" in no("--check", "note.json")
    assert "cannot be read" in no("--check", "nowhere.json")
    judged("theirs:Red", "--attacks", "fgsm")
    assert "has other test images than those of the figures" in no("out", "data.images=120")
