import pytest


@pytest.fixture
def run_script(run_script, tmp_path, warmed_up_model, monkeypatch):
    """Beside the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(warmed_up_model)
    return run_script
