"""The page to look at images in: what it finds, what it is made of, and what it does in a real browser."""

import csv
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("bokeh")
pytest.importorskip("imagehash")

from tests.conftest import call, make_images, write_png
from training import backbone as B
from training import clusters, embed, images, recipe
from training.command import parse
from training.explore import Found, findings, page
from training.explore import __main__ as explore
from training.extraction import plain_batch
from training.files import write_json
from training.markers import written
from training.recipe import to_yaml

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TWINS = ("000.png", "012.png")  # of the pictures below, the same but for a little noise


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 pictures of four classes, two of them nearly the same, one broken."""
    folder, made = tmp_path_factory.mktemp("looked_at"), make_images(40)
    for i in range(40):
        array = made.pixels.picture(i).permute(1, 2, 0).numpy()
        write_png(folder / made.label_names[made.labels[i]] / f"{i:03d}.png", array)
    one = made.pixels.picture(0).permute(1, 2, 0).numpy()
    write_png(folder / "class 0" / "012.png", np.clip(one.astype(int) + 1, 0, 255))
    (folder / "class 1" / "broken.png").write_bytes(b"\x89PNG no more")
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """What a run of one round leaves that is looked at: two backbones, the recipe, and pseudo-labels."""
    folder = tmp_path_factory.mktemp("runs") / "seen"
    options = ["--data.path", str(pictures), "--data.size", "16", "--model.name", "test_resnet", "--run", str(folder)]
    made = parse(options)
    splits = images.sources.read(made.data)[0]
    found = images.load(recipe.Data(str(pictures), size=16, max_bad_fraction=1.0), splits, None)
    for name, seed in (("proxy", 0), ("round_1", 1)):
        torch.manual_seed(seed)
        (folder / name).mkdir(parents=True)
        B.save(B.create(made.model, 16), folder / name, found)
    (folder / "recipe.yaml").write_text(to_yaml(made))
    write_json(folder / "data.json", {"images": len(found), "fingerprint": found.fingerprint})
    labels, distances = found.labels[found.all].numpy(), np.linspace(0, 1, len(found.all), dtype=np.float32)
    labels[:2] = 3  # in the cluster of another class
    columns = {"label_4": labels, "distance_4": distances}
    clusters.write_labels(folder / "round_1" / "labels.parquet", found, found.all, columns)
    write_json(folder / "round_1" / "clusters.json", {"wrote": written(folder / "round_1", ["labels.parquet"])})
    return folder


@pytest.fixture(scope="module")
def shown(run):
    done = call(explore.main, run)
    assert done.returncode == 0, done.stderr
    assert f"{run / 'explore.html'}: " in done.stdout
    return run / "explore.html"


def test_neighbours_are_those_of_a_plain_loop():
    rows = torch.nn.functional.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    near, cosines = findings.nearest(rows, 3)
    for i in range(30):
        plain = sorted((j for j in range(30) if j != i), key=lambda j: -float(rows[i] @ rows[j]))[:3]
        assert near[i].tolist() == plain
        assert cosines[i] == pytest.approx([float(rows[i] @ rows[j]) for j in plain], abs=1e-6)


def test_what_is_far_from_all_leads_the_outliers_and_twins_the_duplicates():
    rows = torch.eye(6).repeat_interleave(5, 0) + 0.05 * torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    rows[7] = torch.tensor([1.0, -1, 1, -1, 1, -1])
    rows[21] = rows[4]
    near, cosines = findings.nearest(torch.nn.functional.normalize(rows, dim=1))
    assert findings.outliers(cosines).images[0] == 7
    alike = findings.alike_by_feature(near, cosines)
    assert (alike.images[0], alike.others[0]) == (4, 21)
    assert alike.scores == sorted(alike.scores)
    assert len({*zip(alike.images, alike.others, strict=True)}) == len(alike.images)  # no pair twice


def test_hashes_find_the_same_picture_in_another_light_and_no_other():
    tiles = np.random.default_rng(0).integers(0, 200, (20, 64, 64, 3), dtype=np.uint8)
    tiles[13] = tiles[5] + 20
    found = findings.alike_by_hash(tiles)
    assert (found.images, found.others) == ([5], [13])


def test_an_image_in_the_cluster_of_another_class_is_listed_and_impure_clusters_are_not():
    labels = np.array([0] * 6 + [1] * 4 + [-1])
    classes = ["cat", "cat", "cat", "cat", "dog", "cow", "cat", "dog", "cow", None, "cat"]
    found = findings.disagreements(labels, np.array([0, 0, 0, 0, 0.5, 0.2, 0, 0, 0, 0, 0]), classes)
    assert found.images == [5, 4]
    assert found.notes[0] == "cluster 0: 67% cat"


def test_a_second_map_keeps_the_places_of_the_first():
    angles = torch.linspace(0, 6.2, 60)
    ring = torch.stack([angles.cos(), angles.sin()], 1)
    for like in (ring.numpy(), ring.flip(1).numpy(), -ring.numpy()):
        assert np.corrcoef(findings.layout(ring, like).ravel(), like.ravel())[0, 1] > 0.9


def test_a_features_file_makes_a_page_and_so_does_some_of_it(run, pictures, tmp_path):
    table, out = tmp_path / "features.parquet", tmp_path / "some.html"
    data = ("--data.path", pictures)
    assert call(embed.main, run / "round_1", *data, "--out", table).returncode == 0
    done = call(explore.main, table, *data, "--images", 20, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "laying out 20 images" in done.stdout or "laying out 19 images" in done.stdout  # one may be the broken one
    assert "before relearning" not in out.read_text()


def test_of_a_features_file_of_every_split_the_training_split_is_shown(pictures, tmp_path):
    loaded, places = explore.some(recipe.Data(str(pictures), size=16), 100, tmp_path)
    paths, split = ["other.png", *loaded.paths], ["test"] + ["train"] * len(loaded)
    pq.write_table(pa.table({"path": paths, "split": split}), tmp_path / "every.parquet")
    assert explore.rows_of(tmp_path / "every.parquet", loaded, places)["path"].to_pylist() == loaded.paths


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("nothing", [], "nothing does not exist"),
        (".", [], "is no run with a backbone in proxy/"),
        ("hub", [], "is no run with a backbone in proxy/; name the run, "),
        ("run", ["--data.path", "{}/../others"], "and are others, or were changed since"),
        ("run", ["--images", "3"], "--images: a map needs at least 5"),
        ("run", ["--data.path", "digits"], "these are not the images of"),
        ("table", [], "data.path is missing"),
        ("run", ["--data.val_fraction", "0.5"], "val_fraction"),
        ("table", ["--data.path", "digits"], "these are not the images of"),
        ("text", ["--data.path", "digits"], "no parquet file"),
        ("table", ["--data.path", "digits", "--out", "{}"], "is what is to be shown"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(run, pictures, tmp_path, source, options, named):
    pq.write_table(pa.table({"path": ["a"], "features": [[1.0]]}), tmp_path / "table")
    (tmp_path / "text").write_text("no table")
    place = {"run": run, "hub": run / "hub"}.get(source, tmp_path / source)
    (run / "hub").mkdir(exist_ok=True)
    if "others" in str(options):
        shutil.copytree(pictures, run.parent / "others", dirs_exist_ok=True)
        one, other = sorted((run.parent / "others").rglob("*.png"))[:2]
        other.write_bytes(one.read_bytes())
    before = place.read_bytes() if place.is_file() else None
    done = call(explore.main, place, "--out", tmp_path / "page.html", *(option.format(place) for option in options))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert named in done.stderr
    assert not (tmp_path / "page.html").exists()
    assert before is None or place.read_bytes() == before


def test_clusters_that_are_not_what_was_written_and_features_that_are_none_are_named(run, pictures, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    labels = tmp_path / "run" / "round_1" / "labels.parquet"
    for damage in (lambda: labels.write_bytes(labels.read_bytes()[:-9]), labels.unlink):
        damage()
        done = call(explore.main, tmp_path / "run")
        assert (done.returncode, done.stderr.count("\n"), f"{labels} is " in done.stderr) == (1, 1, True), done.stderr
    loaded, _ = explore.some(recipe.Data(str(pictures), size=16), 100, tmp_path)
    for features in ("text", 1.0, None):
        rows = [[1.0, 2.0] if features is None else features] * len(loaded)
        if features is None:
            rows[3] = [1.0]
        pq.write_table(pa.table({"path": loaded.paths, "features": rows, "label_x": rows}), tmp_path / "odd.parquet")
        done = call(explore.main, tmp_path / "odd.parquet", "--data.path", pictures)
        assert (done.returncode, "does not hold as many numbers" in done.stderr) == (2, True), done.stderr


def test_without_the_extra_it_says_what_to_install(run, monkeypatch):
    monkeypatch.delattr("training.explore.page")
    monkeypatch.setitem(sys.modules, "training.explore.page", None)
    done = call(explore.main, run)
    assert (done.returncode, done.stderr) == (2, f"error: {explore.NEEDS}\n")


def test_a_comparison_tells_which_of_its_runs_to_look_at(run, tmp_path):
    shutil.copytree(run, tmp_path / "seed_0" / "sslpp")
    done = call(explore.main, tmp_path)
    assert done.returncode == 2
    assert f"name one of its runs, such as {tmp_path / 'seed_0' / 'sslpp'}" in done.stderr


def test_ten_thousand_photographs_stay_under_forty_megabytes():
    noisy = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    assert 10_000 * len(page.thumbnail(noisy)) < 36e6  # edges everywhere; photographs take less


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(shown, browser):
    """The page in a browser, what its console said, and what it asked for."""
    tab, said, asked = browser.new_page(viewport={"width": 1300, "height": 1600}), [], []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(shown.as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [shown.as_uri()]
    tab.close()


def model(tab, name, expression):
    """An expression of a Bokeh model of the page, found by its name, as `it`."""
    return tab.evaluate(
        f"(() => {{ const it = Bokeh.documents[0].get_model_by_name('{name}'); return {expression} }})()"
    )


def place(tab, side, image):
    """Where an image lies on the screen, on the map of a side."""
    found = tab.evaluate(
        """([side, image]) => {
            const plots = [...Bokeh.index.roots[0].children()].flatMap(function all(view) {
                return view.model.type == "Figure" ? [view] : (view.child_views ?? []).flatMap(all) })
            const view = plots[side], data = view.model.renderers[0].data_source.data
            const box = view.el.getBoundingClientRect(), frame = view.frame
            return [box.x + frame.x_scale.compute(data[`x${side}`][image]),
                    box.y + frame.y_scale.compute(data[`y${side}`][image])]
        }""",
        [side, image],
    )
    return tuple(found)


def neighbours(tab):
    """The chosen image and its nearest, as the panel shows them: by side, their indices."""
    tab.wait_for_function("Bokeh.documents[0].get_model_by_name('panel').text.includes('chosen')")
    rows = tab.locator(".near").all()
    chosen = int(tab.locator("img[data-image]").first.get_attribute("data-image"))
    return chosen, [[int(one.get_attribute("data-image")) for one in row.locator("img").all()] for row in rows]


def test_a_hover_shows_the_picture_and_a_click_its_neighbours_under_both(opened, run, pictures):
    x, y = place(opened, 0, 20)
    opened.mouse.move(x, y)
    opened.wait_for_selector(".bk-Tooltip img")
    path, name, cluster = opened.locator(".bk-Tooltip img ~ div").all_inner_texts()[:3]
    assert path.split("/")[0] == name
    assert cluster.endswith("of 4")
    opened.mouse.click(x, y)
    chosen, sides = neighbours(opened)
    assert chosen != 0
    splits = images.sources.read(recipe.Data(str(pictures)))[0]
    found = images.load(recipe.Data(str(pictures), size=16, max_bad_fraction=1.0), splits, None)
    for name, near in zip(("proxy", "round_1"), sides, strict=True):
        network = B.load(run / name).eval()
        with torch.no_grad():
            rows = network(plain_batch(B.as_seen_by(network, found), found.all, torch.device("cpu")))
        expected, _ = findings.nearest(torch.nn.functional.normalize(rows, dim=1))
        assert near == expected[chosen].tolist()
    x, y = place(opened, 1, chosen)
    opened.mouse.click(x, y)
    assert neighbours(opened)[1] == sides


def test_colours_zoom_and_lists_answer(opened, tmp_path):
    before = model(opened, "images", "[...it.data.colour]")
    opened.locator("select").first.select_option("distance from the cluster's centre, k = 4")
    opened.wait_for_timeout(200)
    after = model(opened, "images", "[...it.data.colour]")
    assert before != after
    opened.locator("select").nth(1).select_option("near-duplicates by hash")
    opened.wait_for_timeout(200)
    with opened.expect_download() as waiting:
        opened.get_by_role("button", name="save this list as a table").click()
    waiting.value.save_as(tmp_path / "list.csv")
    rows = list(csv.DictReader((tmp_path / "list.csv").open()))
    assert TWINS in [(row["path"].split("/")[-1], row["other_path"].split("/")[-1]) for row in rows]
    opened.locator("select").nth(1).select_option("cluster and class disagree")
    opened.locator(".slick-row").first.click()
    chosen, _ = neighbours(opened)
    assert chosen in (0, 1)


def test_names_of_files_are_words_and_no_markup(tmp_path, browser):
    tiles = np.zeros((12, 64, 64, 3), np.uint8)
    evil = '<img src="https://example.com/x.png" onerror="alert(1)">'
    found = Found([evil] * 12, tiles, {"features": torch.randn(12, 4)}, [evil, "other"] * 6)
    page.write(tmp_path / "page.html", evil, found)
    tab, asked = browser.new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / "page.html").as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    assert tab.locator("img[onerror]").count() == 0
    assert not [url for url in asked if "example.com" in url]
    tab.close()
