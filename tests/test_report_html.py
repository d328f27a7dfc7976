import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict

import numpy as np
import pytest
from hand_made_runs import evaluation, frames, outcome, write_run
from PIL import Image

from vla_rl._svg import Series, line_chart, nice_ticks, short
from vla_rl.compare import read_runs, write_comparison
from vla_rl.config import IterativeConfig
from vla_rl.data import Episode, EpisodeStore
from vla_rl.evaluation import EvaluationResult
from vla_rl.report_episodes import MAX_FRAMES, picks, shots
from vla_rl.report_html import write_html
from vla_rl.report_time import phase_title
from vla_rl.runs import frames_file, read_run

STAGE1 = "task0-round0-stage1"
TIMES = {"time/rollout_s": 30.0, "time/simulate_s": 12.0, "time/encode_s": 8.0, "time/update_s": 5.0}
CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


def words(page):
    """What the page says, without its tags and pictures."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def pictures(page):
    """Every picture in the page."""
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one RL task whose name needs escaping; its first kept episode failed, the second succeeded."""
    before = EvaluationResult({"drawer:<new>": outcome("-s------", lengths=[90, 40] + [90] * 6)})
    after = EvaluationResult({"drawer:<new>": outcome("sssssss-", lengths=[60, 30] + [50] * 6)})
    results = {
        "after-stage0": {"expert": evaluation(drawer="ssssssss"), "rl": before.to_dict()},
        STAGE1: {
            "task": "drawer:<new>",
            "stored_successes": 7,
            "num_env_steps": 20_000,
            "num_episodes": 321,
            "num_vlm_frames": 20_500,
            "first_success_rate": 0.25,
            "last_success_rate": 0.75,
        },
        "task0-round0-after-stage2": {"expert": evaluation(drawer="ssssss--"), "rl": after.to_dict()},
        "guards": [{"phase": STAGE1, "guard": "kl", "message": "KL of 3.2 <above> 0.5: the update was left out"}],
        "seconds": {"collect": 10.0, STAGE1: 120.0, "total": 150.0},
    }
    config = asdict(IterativeConfig(seed=7))
    config["stage1"]["gamma"] = 0.9
    path = write_run(
        tmp_path_factory.mktemp("runs") / "my run",
        results,
        metrics=[
            {"phase": STAGE1, "step": step, "charts/success_rate": rate, **TIMES}
            for step, rate in ((10_000, float("nan")), (20_000, 0.75))
        ],
        config=config,
        experiment={"command": "vla-rl train x", "notes": ["`A` <note>."], "versions": {"torch": "9.9"}, "config": {}},
    )
    (path / "frames").mkdir()
    kept = [frames((200, 0, 0), 91), frames((0, 200, 0), 41)]
    np.savez(frames_file(path, "after-stage0", "drawer:<new>"), *kept)
    with EpisodeStore(path / "rl_data" / "task0-round0", mode="w-") as store:
        for length in (5, 3, 4):
            pictures = frames((0, 200, 0), length + 1)
            observations = {"image": pictures, "task_id": np.zeros(length + 1, np.int64)}
            rest = (np.zeros((length, 2), np.float32), np.zeros(length), *np.zeros((2, length), bool))
            labels = {"task": "drawer:<new>", "instruction": "open", "source": "rl", "success": True, "seed": length}
            store.append(Episode(observations, *rest, **labels))
    return path


def test_the_page_says_what_the_files_say(run):
    page = write_html(run).read_text()
    text = words(page)
    # Wilson's interval of 7 of 8 is [.5291, .9776]; 7 successes of 8 after 1 of 8 is six pairs more, none fewer.
    for expected in ("0.12 → 0.88", "+0.75 [", "a gain", "0.88 [0.53, 0.98] n = 8", "stage 1: ppo · seed 7 · 2.5 min"):
        assert expected in text
    assert "drawer:<new> 20,000 321 1.02 0.25 → 0.75 7" in text
    assert "kl in stage 1 KL of 3.2 <above> 0.5: the update was left out" in text
    assert "expert episodes 10 s 7%" in text and "rest 20 s 13%" in text
    assert "stage 1 8 s 12 s 10 s 5 s" in text  # VLM, simulation, rest of the rollout, update
    assert "gamma 0.9 (0.99)" in text and "seed 7 (0)" in text and "A <note>." in text
    assert "vla-rl train x" in text and "torch 9.9" in text and "vla-rl train --resume" not in text
    assert "<code>A</code> &lt;note&gt;." in page
    assert "<new>" not in page and "<above>" not in page, "names are escaped"


def test_nothing_is_fetched(run):
    page = write_html(run).read_text()
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_the_episodes_are_the_ones_they_are_said_to_be(run):
    found = shots(read_run(run))
    assert [(s.why, s.success, s.length, s.seed) for s in found] == [
        ("first, failed", False, 90, 10_000),
        ("best", True, 40, 10_001),
        ("best", True, 3, 3),
    ]
    films = [picture for picture in pictures(write_html(run).read_text()) if getattr(picture, "n_frames", 1) > 1]
    assert [film.n_frames for film in films] == [MAX_FRAMES, 41, 4]
    colours = [np.asarray(film.convert("RGB")).mean((0, 1)).argmax() for film in films]
    assert colours == [0, 1, 1], "red, green, green"


def test_long_episodes_are_thinned_and_too_large_ones_become_strips(run, tmp_path):
    page = write_html(run, out=tmp_path / "a.html").read_text()
    assert page.count('class="film') == page.count('class="strip"') == 3
    assert len(re.findall("base64", page)) == 6
    noise = np.random.default_rng(0).integers(0, 255, (200, 400, 300, 3), dtype=np.uint8)
    (big,) = pictures(f'src="{animation_of(noise)}"')
    assert big.n_frames == MAX_FRAMES and big.size == (144, 192)
    page = write_html(run, out=tmp_path / "b.html", max_megabytes=0).read_text()
    assert page.count('class="film') == 0 and page.count('class="strip"') == 3


def animation_of(pixels):
    from vla_rl.report_episodes import animation

    return animation(pixels)


def test_picks():
    assert picks(outcome("--s-ss", lengths=[9, 9, 7, 9, 5, 6]).episodes) == {0: "first, failed", 4: "best"}
    assert picks(outcome("ss-", lengths=[4, 5, 9]).episodes) == {0: "first, best", 2: "failed"}
    assert picks(()) == {}


def test_a_run_that_goes_on_has_a_page_with_the_command_to_continue(tmp_path):
    state = {"done": ["stage0"], "checkpoint": "checkpoints/stage0", "stopped": STAGE1}
    path = write_run(tmp_path / "r 1", {}, state=state, experiment={"command": "c", "config": {}})
    text = words(write_html(path).read_text())
    assert "not finished: 1 phases done" in text and "asked to stop during stage 1" in text
    assert f"vla-rl train --resume '{path}'" in text and "No evaluation has finished yet." in text
    assert "kept no record of guards" in text


@pytest.mark.parametrize(
    ("rl_tasks", "config", "done", "finished"),
    [
        (["a", "b"], {}, "task1-round0-eval2", True),
        (["a", "b"], {}, "task0-round0-eval2", False),
        (["a"], {"rounds": 2}, "task0-round1-eval2", True),
        (["a"], {"stage2_data": "none"}, "task0-round0-eval1", True),
        (["a"], {"stage2_data": "none", "stage1_mode": "collect"}, "task0-round0-stage1", True),
        (["a"], {"stage2_data": "none", "stage1_mode": "none"}, "eval-stage0", True),
        ([], {}, "eval-stage0", True),
        ([], {}, "stage0", False),
    ],
)
def test_a_run_from_python_has_finished_with_its_last_phase(tmp_path, rl_tasks, config, done, finished):
    config = asdict(IterativeConfig(**config))
    path = write_run(tmp_path / "r", {}, state={"done": [done]}, config=config, start={"rl_tasks": rl_tasks})
    run = read_run(path)
    assert run.finished is finished
    assert ("IterativeTrainer.resume" in words(write_html(path).read_text())) is not finished


def test_no_run_but_one_of_a_similar_name(tmp_path):
    write_run(tmp_path / "first", {})
    with pytest.raises(FileNotFoundError, match=rf"did you mean {tmp_path / 'first'}\?"):
        write_html(tmp_path / "frist")
    with pytest.raises(FileNotFoundError, match=rf"did you mean {tmp_path / 'first'}\?"):
        write_html(tmp_path)


def test_a_first_rollout_in_which_no_episode_ended_has_a_dash(tmp_path):
    counts = {"stored_successes": 0, "num_env_steps": 9, "num_episodes": 1, "num_vlm_frames": 9}
    entry = {"task": "t", **counts, "first_success_rate": float("nan"), "last_success_rate": 0.0}
    page = write_html(write_run(tmp_path / "r", {STAGE1: entry})).read_text()
    assert "– → 0.00" in page and "nan" not in words(page).split()


def test_phase_titles():
    one = ["stage0", "task0-round0-stage1"]
    assert phase_title("stage0", one) == "stage 0"
    assert phase_title("eval-stage0", one) == "evaluation after stage 0"
    assert phase_title("task0-round0-eval2", one) == "evaluation after stage 2"
    several = [*one, "task1-round0-stage1"]
    assert phase_title("task0-round0-stage1", several) == "stage 1 (task 0, round 0)"
    assert phase_title("total", one) == "total"


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert nice_ticks(-3, 17) == pytest.approx([0, 5, 10, 15])
    assert [short(v) for v in (0, 0.25, 1500, 2e6, 1e-5)] == ["0", "0.25", "1.5k", "2M", "1e-05"]


def test_a_chart_draws_finite_points_where_they_belong():
    chart = line_chart([Series("a", [0, 1, 2], [0.0, float("nan"), 1.0])], title="t", y_range=(0, 1))
    (line,) = re.findall(r'class="line" d="M([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+)"', chart)
    x0, y0, x1, y1 = map(float, line)
    assert x0 < x1 and y0 > y1, "up is smaller in SVG"
    heights = {
        text: float(y) for y, text in re.findall(r'y1="([\d.]+)" y2="[\d.]+"/><text[^>]*>([\d.]+)</text>', chart)
    }
    assert heights["0"] == y0 and heights["1"] == y1
    assert line_chart([Series("a", [0], [float("nan")])], title="t") == ""


MEASURE = """
const frame = document.getElementById("frame").contentWindow, page = frame.document;
const report = {
  scroll: page.documentElement.scrollWidth, width: frame.innerWidth,
  images: [...page.images].map(image => image.naturalWidth),
  fetched: frame.performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
  paper: frame.getComputedStyle(page.body).backgroundColor,
  headings: [...page.querySelectorAll("h2")].map(h => h.textContent),
  bars: [...page.querySelectorAll(".stack i")].map(bar => bar.getBoundingClientRect().width),
};
const out = document.createElement("pre");
out.id = "out";
out.textContent = JSON.stringify(report);
document.body.replaceChildren(out);
"""


def chromium(page, tmp_path, *options, width, script="", dark=False):
    """What a headless Chromium prints of a page in a frame of a width, which may be less than a window's least."""
    assert CHROMIUM, "no Chromium found; on Debian: apt-get install chromium"
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<body style="margin:0"><iframe id="frame" width="{width}" height="800" style="border:0" '
        f'srcdoc="{html.escape(page)}"></iframe><script>{script}</script>'
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    options += [f"--user-data-dir={tempfile.mkdtemp(dir=tmp_path)}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    return subprocess.run([CHROMIUM, *options, wrapper.as_uri()], capture_output=True, text=True, timeout=120).stdout


def browse(page, tmp_path, *, width, dark=False):
    """Measurements of a page."""
    script = f'addEventListener("load", () => {{{MEASURE}}});'
    dom = chromium(page, tmp_path, "--dump-dom", width=width, dark=dark, script=script)
    (report,) = re.findall(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(report))


def screenshot(page, tmp_path, *, width, dark=False):
    """The upper 800 pixels of a page, uint8 [800, width, 3]."""
    file = tmp_path / "shot.png"
    chromium(
        page, tmp_path, f"--screenshot={file}", "--window-size=1200,800", "--virtual-time-budget=2000",
        width=width, dark=dark,
    )  # fmt: skip
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))[:800, :width]


IN_A_BROWSER = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("VLA_RL_CI"),
    reason="no Chromium found; on Debian: apt-get install chromium",
)


@pytest.mark.slow
@IN_A_BROWSER
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)], ids=["desk, light", "phone, dark"])
def test_pictures_of_the_pages_show_something(run, tmp_path, width, dark):
    other = shutil.copytree(run, tmp_path / "other")
    pages = write_html(run, out=tmp_path / "a.html"), write_comparison(read_runs([run, other]), tmp_path / "b.html")
    for page in pages:
        picture = screenshot(page.read_text(), tmp_path, width=width, dark=dark).astype(int)
        assert picture.shape == (800, width, 3)
        paper = picture[2, 2]
        assert np.ptp(paper) < 12 and (paper.mean() < 60 if dark else paper.mean() > 200)
        written = np.abs(picture - paper).sum(2) > 60
        assert 0.01 < written.mean() < 0.5, "neither blank nor all ink"
        assert all(band.any() for band in np.array_split(written, 8)), "from top to bottom"
        coloured = np.ptp(picture, axis=2) > 60  # the lines of the charts
        assert coloured.sum() > 200


@pytest.mark.slow
@IN_A_BROWSER
def test_in_a_browser(run, tmp_path):
    page = write_html(run, out=tmp_path / "page.html").read_text()
    phone = browse(page, tmp_path, width=360)
    assert phone["scroll"] <= phone["width"] == 360, "nothing sticks out sideways"
    assert len(phone["images"]) == 6 and min(phone["images"]) >= 32, "every picture is one"
    assert phone["fetched"] == []
    assert {"Every task", "Learning", "Episodes", "Guards", "Configuration"} <= set(phone["headings"])
    desk = browse(page, tmp_path, width=1200, dark=True)
    assert desk["scroll"] <= 1200
    lightness = [sum(map(int, re.findall(r"\d+", report["paper"]))) / 3 for report in (phone, desk)]
    assert lightness[0] > 200 and lightness[1] < 60
    collect, stage1, rest = desk["bars"]
    assert stage1 / collect == pytest.approx(12, rel=0.2) and rest / collect == pytest.approx(2, rel=0.2)
    broken = page.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>')
    assert browse(broken, tmp_path, width=360)["fetched"] == ["http://127.0.0.1:9/x.png"], "it would have been noticed"
