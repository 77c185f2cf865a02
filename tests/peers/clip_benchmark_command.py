"""Runs CLIP_benchmark's command and clip_jax's on the same weights and data.

CLIP_benchmark 1.6.2 does not run as it is: its `accuracy` raises TypeError with NumPy 2.4. `main` replaces it by the
same formula; the rest is its own code.
"""

import importlib
import io
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).parents[2]
METRICS = {  # by task: names in CLIP_benchmark's reports and in clip_jax's
    "zeroshot_classification": {
        "acc1": "zeroshot/{}/top1",
        "acc5": "zeroshot/{}/top5",
        "mean_per_class_recall": "zeroshot/{}/mean_per_class",
    },
    "zeroshot_retrieval": {
        f"{retrieved}_retrieval_recall@{k}": f"retrieval/{{}}/{way}/recall_at_{k}"
        for way, retrieved in (("image_to_text", "text"), ("text_to_image", "image"))
        for k in (1, 5, 10)
    },
}


def write_split(folder: pathlib.Path, split: str, images, targets, *, class_names=()) -> None:
    """Write one shard in CLIP_benchmark's layout. targets: class ids, or for each image its captions."""
    (folder / split).mkdir(parents=True)
    (folder / split / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("classification" if class_names else "retrieval")
    if class_names:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in class_names))
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    with tarfile.open(folder / split / "0.tar", "w") as tar:
        for row, (image, target) in enumerate(zip(images, targets, strict=True)):
            kind, text = ("cls", str(target)) if class_names else ("txt", "\n".join(target))
            for suffix, content in (("png", image), (kind, text.encode())):
                member = tarfile.TarInfo(f"s{row:07d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def clip_benchmark(weights: pathlib.Path, data: pathlib.Path, datasets) -> dict[str, float]:
    """Return the metrics of CLIP_benchmark's command on `<data>/wds_<dataset>`, by clip_jax's names."""
    command = [sys.executable, __file__, "eval", "--no_amp", "--quiet"]
    command += [f"--model=local-dir:{weights}", "--pretrained=none", "--num_workers=0"]
    command += [f"--dataset_root={data}/wds_{{dataset}}", f"--output={data}/{{dataset}}-{{task}}.json"]
    command += ["--recall_k", "1", "5", "10", "--dataset", *(f"wds/{d}" for d in datasets)]
    _run(command)
    metrics = {}
    for dataset in datasets:
        for path in data.glob(f"{dataset}-*.json"):
            found = json.loads(path.read_text())
            names = METRICS[found["task"]]
            metrics |= {name.format(dataset): found["metrics"][source] for source, name in names.items()}
    return metrics


def clip_jax(weights: pathlib.Path, data: pathlib.Path, datasets, *evaluators: str, tiny=False) -> dict[str, float]:
    """Return report.json of `clip_jax.evaluate --protocol=published`. tiny: datasets may have any size."""
    program = ["tests/tiny_evaluate.py"] if tiny else ["-m", "clip_jax.evaluate"]
    command = [sys.executable, *program, f"--weights={weights}", f"--data_dir={data}", f"--out={data}/evaluation"]
    command += [f"--datasets={','.join(datasets)}", f"--evaluators={','.join(evaluators)}", "--cache_dir="]
    _run([*command, "--protocol=published"])
    return json.loads((data / "evaluation/report.json").read_text())


def scikit_learn_probe(weights: pathlib.Path, train, test, report, dataset: str) -> float:
    """Return the accuracy of scikit-learn's probe with clip_jax's l2, on open_clip's features before the projection.

    The solver is not the default, L-BFGS, whose fits end far from the optimum at any tolerance.

    Args:
      train: encoded images and class ids of the training and validation split.
      test: those of the test split.
      report: clip_jax's, which has the l2 of the dataset.
    """
    import open_clip
    import torch
    from PIL import Image
    from sklearn.linear_model import LogisticRegression

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{weights}")
    model.eval().visual.proj = None

    @torch.no_grad()
    def features(images):
        pixels = (transform(Image.open(io.BytesIO(image)).convert("RGB"))[None] for image in images)
        return torch.cat([model.encode_image(batch) for batch in map(torch.cat, _batches(pixels))]).double().numpy()

    l2 = float(report[f"run/descriptions.linear_probe/{dataset}"].partition("l2=")[2].split()[0])
    l2 = 10 ** (round(8 * math.log10(l2)) / 8)  # the report rounds the value of the search, 8 per decade
    fitted = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    return fitted.fit(features(train[0]), train[1]).score(features(test[0]), test[1])


def _batches(items, size=256):
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def _run(command: list[str]) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")


def accuracy(output, target, topk=(1,)):
    """Return CLIP_benchmark's accuracies: its `accuracy` without the conversion that NumPy 2.4 refuses."""
    correct = output.topk(max(topk), 1, True, True)[1] == target[:, None]
    return [correct[:, :k].sum().item() / len(target) for k in topk]


def main() -> None:
    """Run CLIP_benchmark's command."""
    importlib.import_module("conftest")  # imports torchvision without CUDA

    from clip_benchmark import cli
    from clip_benchmark.metrics import zeroshot_classification

    zeroshot_classification.accuracy = accuracy
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
