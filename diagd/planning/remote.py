"""Shapes of a checkpoint on the Hugging Face Hub from its header: a few kilobytes, whatever its size."""

from __future__ import annotations

from diagd.errors import CheckpointError, require

Shape = tuple[int, ...]


def remote_shapes(repo: str, revision: str | None) -> dict[str, Shape]:
    """Shapes of all tensors of a repository's safetensors files; no weights are fetched.

    Raises:
        CheckpointError: the repository cannot be read, or holds its weights in another format.
        DependencyError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", extra="export", purpose="read the header of an hf:// checkpoint")
    try:
        files = hub.HfApi().get_safetensors_metadata(repo, revision=revision).files_metadata.values()
    except hub.errors.NotASafetensorsRepoError as error:
        raise CheckpointError(
            f"hf://{repo} has no model.safetensors, so its shapes cannot be read without its weights; leave "
            "--checkpoint out to plan by the published dimensions, or give the path of your own copy"
        ) from error
    except Exception as error:  # which class a failed connection raises depends on the HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the header of hf://{repo} cannot be read ({reason}); check the name and the connection, "
            "sign in with 'hf auth login' where it is gated, or leave --checkpoint out"
        ) from error
    return {name: tuple(info.shape) for file in files for name, info in file.tensors.items()}


def check_shapes(repo: str, found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    """Refuse a repository whose tensors are not those of the model.

    Raises:
        CheckpointError: tensors are missing or have another shape.
    """
    wrong = [
        f"{name} {list(found[name]) if name in found else 'missing'}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"hf://{repo} is not this model: {'; '.join(wrong[:5])}{more}")
