"""A checkpoint is pushed, and used by somebody who has nothing else. Data: dataset_builders/test_publishing.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_clients import run, start
from local_hub import Repo
from safetensors.torch import load

ROOT = Path(__file__).parents[1]
NAME = "org/tiny-lsm"
CODE = ("configuration_lsm", "modeling_lsm", "processing_lsm")


PUBLISH = """
import json, pathlib, sys
from huggingface_hub import HfApi
import modeling_lsm
from processing_lsm import LsmProcessor
folder, name = sys.argv[1:]
model = modeling_lsm.LsmForConditionalGeneration.from_pretrained(folder)
model.push_to_hub(name)
LsmProcessor.from_pretrained(folder).push_to_hub(name)
first = HfApi().model_info(name).sha
model.lm_head.weight.data.mul_(2)
model.push_to_hub(name)
code = pathlib.Path(modeling_lsm.__file__).read_bytes() + b"\\nEDITION = 2\\n"
HfApi().upload_file(path_or_fileobj=code, path_in_repo="modeling_lsm.py", repo_id=name)
print(json.dumps([first, HfApi().model_info(name).sha]))
"""

LOAD = f"""
import json, sys
sys.modules.update(dict.fromkeys({CODE}))  # the checkout is installed here; users cannot import it
import numpy as np, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
torch.set_num_threads(1)
name = sys.argv[1]

@torch.no_grad()
def use(auto, **revisions):
    config = AutoConfig.from_pretrained(name, trust_remote_code=True, **revisions)
    model = auto.from_pretrained(name, trust_remote_code=True, **revisions).eval()
    revisions.pop("code_revision", None)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **revisions)
    inputs = processor(text="Repeat: <|audio|>", audio=np.sin(np.arange(9000) / 20), return_tensors="pt")
    modules = [type(part).__module__ for part in (config, model, processor)]
    edition = getattr(sys.modules[modules[1]], "EDITION", 1)
    return {{"logits": model(**inputs).logits[0].tolist(), "modules": modules, "edition": edition}}
"""

USE = f"""{LOAD}
first = sys.argv[2]
found = [use(auto) for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM)]
found += [use(AutoModel, revision=first), use(AutoModel, code_revision=first)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def commits(hub, lsm_dir, tmp_path_factory) -> list[str]:
    """A commit with the model of `lsm_dir`, and a later one with twice its logits and other code."""
    home = tmp_path_factory.mktemp("publisher") / "home"
    return run(PUBLISH, hub, home, str(lsm_dir), NAME, PYTHONPATH=str(ROOT))


# Models


@torch.no_grad()
def test_a_user_without_the_checkout_runs_what_was_pushed(hub, commits, lsm, processor, tmp_path):
    inputs = processor(text="Repeat: <|audio|>", audio=np.sin(np.arange(9000) / 20), return_tensors="pt")
    expected = lsm(**inputs).logits[0]
    first, second = commits
    online = run(USE, hub, tmp_path / "home", NAME, first)
    asked = len(hub.requests)
    offline = run(USE, hub, tmp_path / "home", NAME, first, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    # Which weights, and which code of configuration, model and processor.
    newest, pinned, pinned_code = (2, [second] * 3), (1, [first] * 3), (2, [first, first, second])
    for found in (online, offline):
        for one, (factor, shas) in zip(found, [newest, newest, newest, pinned, pinned_code], strict=True):
            torch.testing.assert_close(torch.tensor(one["logits"]), factor * expected, atol=1e-5, rtol=0)
            home = "transformers_modules.org.tiny_hyphen_lsm"
            assert one["modules"] == [f"{home}.{sha}.{module}" for sha, module in zip(shas, CODE, strict=True)]
            assert one["edition"] == (2 if shas[1] == second else 1)


def test_the_repo_holds_what_a_checkpoint_needs_and_no_pickles(hub, commits, lsm):
    files = hub.repos["model", NAME].files(commits[0])
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_lsm.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_lsm.py",
        "processing_lsm.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path for path, file in files.items() if file.large] == ["model.safetensors"]
    weights = load(files["model.safetensors"].content)
    assert set(weights) == set(lsm.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in lsm.state_dict().items())
    for module in CODE:
        assert files[f"{module}.py"].content == (ROOT / f"{module}.py").read_bytes()
    model = "modeling_lsm.LsmForConditionalGeneration"
    assert json.loads(files["config.json"].content)["auto_map"] == {
        "AutoConfig": "configuration_lsm.LsmConfig",
        "AutoModel": model,
        "AutoModelForCausalLM": model,
        "AutoModelForMultimodalLM": model,
        "AutoProcessor": "processing_lsm.LsmProcessor",
    }
    processor_config = json.loads(files["processor_config.json"].content)
    assert processor_config["auto_map"] == {"AutoProcessor": "processing_lsm.LsmProcessor"}


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("org/cut-lsm", ["SafetensorError: ", "incomplete metadata, file not fully covered"]),
        ("org/missing-lsm", ["RepositoryNotFoundError: 404", "OSError: org/missing-lsm is not a local folder"]),
    ],
)
def test_a_broken_or_missing_checkpoint_is_an_error_that_says_so(hub, commits, tmp_path, name, messages):
    if name == "org/cut-lsm":
        whole = {path: file.content for path, file in hub.repos["model", NAME].files().items()}
        repo = hub.repos["model", name] = Repo(name)
        repo.commit({**whole, "model.safetensors": whole["model.safetensors"][:-1000]})
    result = start(f"{LOAD}\nuse(AutoModel)", hub, tmp_path / "home", name)
    assert result.returncode == 1
    for message in messages:
        assert message in result.stderr


# The local Hub itself

CALLS = """
import json, pathlib
from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api, name = HfApi(), "org/files"
api.create_repo(name)
pathlib.Path("up/sub").mkdir(parents=True)
pathlib.Path("up/large.bin").write_bytes(bytes(range(256)) * 64)
pathlib.Path("up/sub/small.txt").write_text("small")
api.upload_folder(repo_id=name, folder_path="up")
api.create_tag(name, tag="v1")
api.create_branch(name, branch="dev/1")
parent = api.model_info(name).sha
api.upload_file(repo_id=name, path_or_fileobj=b"new", path_in_repo="sub/small.txt", revision="dev/1")
api.delete_folder("sub", name)
snapshot = pathlib.Path(snapshot_download(name, revision="v1"))
with HfFileSystem().open(f"{name}/large.bin", block_size=100) as file:
    file.seek(1000)
    part = list(file.read(3))
errors = []
for call in (
    lambda: api.model_info("org/none"),
    lambda: api.model_info(name, revision="none"),
    lambda: api.hf_hub_download(name, "none"),
    lambda: api.delete_file("none", name),
    lambda: api.create_repo(name),
    lambda: api.create_branch(name, branch="dev/1"),
    lambda: api.upload_file(repo_id=name, path_or_fileobj=b"x", path_in_repo="x", parent_commit=parent),
):
    try:
        call()
    except HfHubHTTPError as error:
        errors.append([type(error).__name__, error.response.status_code])
print(json.dumps({
    "files": api.list_repo_files(name),
    "infos": [[type(info).__name__, info.path] for info in api.get_paths_info(name, ["sub", "none"], revision="v1")],
    "branch": HfFileSystem().read_text(f"{name}@dev%2F1/sub/small.txt"),
    "snapshot": {str(path.relative_to(snapshot)): path.stat().st_size for path in snapshot.glob("**/*.[bt]*")},
    "part": part,
    "errors": errors,
}))
"""


def test_the_local_hub_knows_revisions_folders_ranges_and_errors(hub, tmp_path):
    assert run(CALLS, hub, tmp_path / "home") == {
        "files": [".gitattributes", "large.bin"],
        "infos": [["RepoFolder", "sub"]],
        "branch": "new",
        "snapshot": {"large.bin": 256 * 64, "sub/small.txt": 5},
        "part": [1000 % 256, 1001 % 256, 1002 % 256],
        "errors": [
            ["RepositoryNotFoundError", 404],
            ["RevisionNotFoundError", 404],
            ["RemoteEntryNotFoundError", 404],
            ["RemoteEntryNotFoundError", 404],
            ["HfHubHTTPError", 409],
            ["HfHubHTTPError", 409],
            ["HfHubHTTPError", 412],
        ],
    }
