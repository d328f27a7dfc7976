"""The site builds without a warning, and what the navigation promises is there."""

import json
import re
import subprocess
import sys

import pytest
from pages import DOCS, PAGES, ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
def test_every_page_is_built(site):
    for path in PAGES:
        relative = path.relative_to(DOCS).with_suffix("")
        page = site / (relative.parent if relative.name == "index" else relative) / "index.html"
        assert page.is_file(), relative
    assert (site / "contributing" / "index.html").is_file() and (site / "changelog" / "index.html").is_file()


@pytest.mark.slow
def test_links_out_of_the_documentation_lead_to_the_files_themselves(site):
    page = (site / "scripts" / "ppo_frozen_vlm" / "index.html").read_text()
    assert 'href="../../source/examples/ppo_frozen_vlm.py/"' in page
    shown = (site / "source" / "examples" / "ppo_frozen_vlm.py" / "index.html").read_text()
    assert "target_kl" in shown
    lines = set(re.findall(r'href="\.\./\.\./source/examples/ppo_frozen_vlm\.py/#(__codelineno-0-\d+)"', page))
    assert len(lines) > 5 and all(f'name="{line}"' in shown or f'id="{line}"' in shown for line in lines)
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert not any(entry["location"].startswith("source/") for entry in index["docs"])


@pytest.mark.slow
def test_the_reference_shows_signatures_and_arguments(site):
    page = re.sub(r"<[^>]+>", "", (site / "reference" / "rl" / "index.html").read_text())
    assert "PPOConfig" in page and "above this approximate KL of a minibatch" in page
