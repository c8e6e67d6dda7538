"""Do torchattacks and foolbox find what `dist-adv eval` reports?

Command: python benchmarks/judges.py RUN_DIR

Runs PGD with the same radius, steps and step size by all three on the same test images, and
prints a Markdown table. dist_adv counts a sample as fooled at any iterate and never attacks what
is wrong already; the others judge the last iterate of every sample, so they may leave slightly
more. Needs the test extra and torchattacks.
"""

import argparse
from pathlib import Path

import foolbox
import torch
import torchattacks

from dist_adv import load_model, rng
from dist_adv.attacks.threat import build
from dist_adv.config import load_config
from dist_adv.data import load_dataset
from dist_adv.distributed import start
from dist_adv.evaluation.evaluate import evaluate
from dist_adv.evaluation.results import wilson


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=1000)
    options = parser.parse_args()

    config = load_config(options.run_dir / "config.yaml")
    accelerator = start.start_accelerator("fp32", config.train.threads)
    model = load_model(options.run_dir).to(accelerator.device)
    data = load_dataset(config.data, "test")
    threat = build(config.threat.norm, config.threat.eps)
    asked = {"attacks": ["natural", f"pgd-{options.steps}"], "limit": options.limit}
    ours, _ = evaluate(model, data, threat, config.eval.model_copy(update=asked), accelerator)

    # The same images as `evaluate` takes for a limit.
    chosen = rng.permutation(rng.stream_key("subset"), len(data))[: options.limit]
    x = (data.images[chosen].float() / 255).to(accelerator.device)
    y = data.labels[chosen].to(accelerator.device)
    step = config.eval.step_size or threat.eps / 4
    torch.manual_seed(0)
    theirs = torchattacks.PGD(model, threat.eps, step, options.steps, random_start=True)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=accelerator.device)
    linf = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=options.steps, random_start=True)
    survivors = {"torchattacks": 0, "foolbox": 0}
    for images, labels in zip(x.split(500), y.split(500), strict=True):
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        attacked = {
            "torchattacks": theirs(images, labels),
            "foolbox": linf(wrapped, images, labels, epsilons=threat.eps)[1],
        }
        for judge, adversarial in attacked.items():
            with torch.no_grad():
                survivors[judge] += int(((model(adversarial).argmax(1) == labels) & right).sum())

    print(f"| judge | PGD-{options.steps} accuracy | 95 % interval | n |\n|---|---|---|---|")
    counts = {"dist_adv": ours[1].correct, **survivors}
    for judge, correct in counts.items():
        low, high = wilson(correct, len(y))
        print(f"| {judge} | {correct / len(y):.2%} | {low:.2%} to {high:.2%} | {len(y)} |")


if __name__ == "__main__":
    main()
