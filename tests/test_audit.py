"""Audits: each finding in a model into which exactly that fault was put, and silence otherwise."""

import copy
import json
import re

import pytest
import torch
from audited import BATCH, POPULATION, TEST, Net, batches, healthy, samples, train
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnexp.auditing import audit
from bnexp.errors import UserError
from bnexp.records.audit import AuditRecord
from bnexp.report.audit_page import render_record
from bnexp.statistics import Statistics, recompute_statistics, running_statistics


def harmful(result):
    return [finding.code for finding in result.findings if not finding.harmless]


# ------------------------------------------------------------------------ silence


@pytest.mark.parametrize("momentum", [0.1, 0.05])
def test_a_healthy_model_has_no_findings(momentum):
    result = audit(healthy(momentum), POPULATION, TEST, batch=True)
    assert result.findings == ()
    assert result.summary.startswith("Nothing is wrong with your statistics; look elsewhere.")
    assert result.comparison.verdict.outcome in ("agree", "undecided", "identical")


def test_a_model_mended_has_no_findings_any_more():
    model = healthy()
    model.bn2.running_var.mul_(40)
    result = audit(model, POPULATION, TEST)
    result.mend(model)
    again = audit(model, POPULATION, TEST)
    assert harmful(result) and not again.findings


def test_the_model_is_as_before():
    model = healthy()
    model.train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    state = torch.get_rng_state()
    audit(model, POPULATION, TEST, batch=True)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------ faults put in


def as_constructed(model):
    for layer in (model.bn1, model.bn2, model.bn3):
        layer.reset_running_stats()


def never_updated(model):
    as_constructed(model)
    for layer in (model.bn1, model.bn2, model.bn3):
        layer.momentum = 0
        layer.num_batches_tracked.fill_(150)


def not_finite(model):
    model.bn2.running_var[3] = float("inf")


def dead_but_alive(model):
    model.bn2.running_var[:8] = 0


def huge(model):
    model.bn2.running_var[5] *= 1e5


def off_first(model):
    """As if the inputs had been scaled and shifted in training."""
    model.bn1.running_mean.add_(3 * model.bn1.running_var.sqrt())
    model.bn1.running_var.mul_(9)


def off_behind(model):
    model.bn3.running_mean.add_(2 * model.bn3.running_var.sqrt())


def used_otherwise(model):
    """A layer whose buffers are read, but which is not called."""
    bn = model.bn3
    model.fc1 = nn.Sequential(model.fc1, Reads(bn))
    model.bn3 = nn.Identity()
    model.kept = bn


class Reads(nn.Module):
    def __init__(self, bn):
        super().__init__()
        self.hidden = [bn]

    def forward(self, x):
        bn = self.hidden[0]
        y = (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
        return y * bn.weight + bn.bias


FAULTS = {
    "as-constructed": (as_constructed, {"bn1", "bn2", "bn3"}, "counted no mini-batch"),
    "as-constructed (momentum)": (never_updated, {"bn1", "bn2", "bn3"}, "momentum is 0"),
    "not-finite": (not_finite, {"bn2"}, "1 channel of layer bn2"),
    "dead-channels": (dead_but_alive, {"bn2"}, "8 channels of 1 layer"),
    "huge-variance": (huge, {"bn2"}, "running variance of a channel of bn2 is"),
    "inputs-differ": (off_first, {"bn1"}, "very first BN layer, bn1, is off already"),
    "lagging": (off_behind, {"bn3"}, "most of all bn3"),
    "used-uncalled": (used_otherwise, {"kept"}, "Never called"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_was_put_in_is_found(name):
    put_in, layers, said = FAULTS[name]
    model = healthy()
    put_in(model)
    result = audit(model, POPULATION, TEST)
    code = name.partition(" ")[0]
    (finding,) = [f for f in result.findings if f.code == code]
    assert set(finding.layers) == layers
    assert said in finding.evidence
    assert finding.effect.endswith((".", ")")) and finding.remedy
    others = {f.code for f in result.findings if not f.harmless} - {code}
    # A variance of nothing, or of far too much, is also far from the population.
    assert others <= ({"lagging"} if code in ("dead-channels", "huge-variance") else set())


def test_averages_that_the_file_lacks():
    model = healthy()
    as_constructed(model)
    result = audit(model, POPULATION, TEST, not_in_file=("bn1", "bn2", "bn3"))
    (finding,) = result.findings
    assert finding.code == "as-constructed"
    assert "the checkpoint has no running averages for 3 layers" in finding.evidence


def test_a_share_of_the_initial_values():
    torch.manual_seed(0)
    model = train(Net(momentum=0.002))
    result = audit(model, POPULATION, TEST)
    assert harmful(result) == ["initial-share"]
    (finding,) = result.findings
    assert f"{100 * 0.998**150:.1f} %" in finding.evidence
    assert "costs" in finding.effect and finding.recomputing_helps
    assert result.comparison.verdict.outcome == "baseline-worse"
    assert result.attribution.explained == pytest.approx(result.attribution.difference, rel=0.1)


def test_a_share_of_the_initial_values_that_the_layers_do_not_know_of():
    """A checkpoint has the averages and their count, and not the momentum they were made with."""
    torch.manual_seed(0)
    model = train(Net(momentum=0.002))
    for layer in (model.bn1, model.bn2, model.bn3):
        layer.momentum = 0.1
    result = audit(model, POPULATION, TEST)
    assert harmful(result) == ["initial-share"]
    assert "over 150 mini-batches" in result.findings[0].evidence
    assert "decay of about 0.99" in result.findings[0].evidence


def test_other_inputs_than_those_of_training():
    """Trained on images from 0 to 255, judged on images from 0 to 1."""
    torch.manual_seed(0)
    model = train(Net(), scale=255.0)
    result = audit(model, POPULATION, TEST)
    assert harmful(result)[0] == "inputs-differ"
    assert result.comparison.verdict.outcome in ("baseline-worse", "baseline-at-chance")


def test_noise_of_averages():
    """The averages of a single mini-batch: no further off than such a decay explains."""
    model = healthy()
    model.train()
    for layer in (model.bn1, model.bn2, model.bn3):
        layer.momentum = 0.999
    model(batches(4, 7)[0][0])
    model.eval()
    small = batches(1024, 1, size=4)
    result = audit(model, small, TEST, methods=("pooled",), samples=None)
    assert harmful(result) == ["noisy"]


def test_averages_of_other_weights():
    model = healthy()
    result = audit(model, POPULATION, TEST, same_averages_as="state_dict")
    (finding,) = result.findings
    assert finding.code == "of-other-weights" and finding.harmless, "here they fit all the same"
    with torch.no_grad():
        for p in (model.conv1.weight, model.conv2.weight, model.fc1.weight):
            p.mul_(0.2)
    result = audit(model, POPULATION, TEST, same_averages_as="state_dict")
    assert "of-other-weights" in harmful(result)


def test_another_eps():
    """Weights that were trained with Keras' eps: the variances of half the channels are of its
    size, and the scales made up for it."""
    model = healthy()
    bn = model.bn1
    own = torch.where(torch.arange(8) % 2 == 0, 1.0, 0.003)
    with torch.no_grad():
        model.conv1.weight.mul_(own[:, None, None, None])
        bn.running_mean.mul_(own)
        new = bn.running_var * own**2
        bn.weight.mul_(((new + 1e-3) / (bn.running_var + bn.eps)).sqrt() / own)
        bn.running_var.copy_(new)
    result = audit(model, POPULATION, TEST)
    assert harmful(result)[0] == "eps", "and layers behind get other inputs than in training"
    assert "With eps 0.001 instead of 1e-05" in result.findings[0].evidence
    bn.eps = 1e-3
    assert audit(model, POPULATION, TEST).findings == ()


def test_how_layers_are_set_up():
    model = healthy()
    model.bn1.training = True
    assert [f.code for f in audit(model, POPULATION, TEST).findings] == ["training-mode"]
    model = healthy().train()
    model.bn2.training = False
    (finding,) = audit(model, POPULATION, TEST).findings
    assert finding.code == "frozen" and finding.layers == ("bn2",) and finding.harmless
    (finding,) = [f for f in audit(healthy(None), POPULATION, TEST).findings
                  if f.code == "cumulative"]  # fmt: skip
    assert "150 mini-batches" in finding.evidence


def test_layers_without_running_averages():
    torch.manual_seed(0)
    model = Net()
    model.bn2 = nn.BatchNorm2d(16, track_running_stats=False)
    train(model)
    result = audit(model, POPULATION, TEST)
    assert harmful(result) == ["no-running-statistics"]
    assert "bn2" in result.statistics["recomputed"].mean
    with pytest.raises(UserError, match="keeps no running statistics"):
        result.mend(model)


def test_layers_that_no_sample_reaches():
    model = healthy()
    model.auxiliary = nn.BatchNorm2d(3).eval()
    model.auxiliary.num_batches_tracked.fill_(1000)
    model.auxiliary.running_var.mul_(2)
    with pytest.warns(UserWarning, match="no batch reached"):
        result = audit(model, POPULATION, TEST)
    (finding,) = result.findings
    assert finding.code == "unreached" and finding.layers == ("auxiliary",) and finding.harmless


def test_a_network_that_depends_on_its_mini_batch():
    """Every test mini-batch is of one class, and each class has its own brightness."""

    class Relative(nn.Module):
        """Says whether a sample is brighter than its mini-batch."""

        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(1)

        def forward(self, x):
            z = self.bn(x)
            return torch.cat([-z, z], 1)

    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(40):
        x = torch.randn(64, 1, generator=generator)
        data.append((x + 10 * (i % 2), (x[:, 0] > 0).long()))
    model = Relative()
    model.train()
    for x, _ in data:
        model(x)
    model.eval()
    result = audit(model, data[:20], data[20:], batch=True)
    finding = next(f for f in result.findings if f.code == "depends-on-batch")
    assert finding.recomputing_helps is False
    with pytest.raises(UserError, match="depends-on-batch"):
        result.mend(model)
    result.mend(model, force=True)


def test_a_population_that_spoils():
    """Recomputing from other data than the model is for makes it worse, and is not done."""
    model = healthy()
    result = audit(model, batches(512, 3, scale=0.05), TEST)
    assert "recomputing-hurts" in harmful(result)
    before = running_statistics(model)
    with pytest.raises(UserError, match="recomputing-hurts says that recomputing does not help"):
        result.mend(model)
    assert torch.equal(running_statistics(model).mean["bn1"], before.mean["bn1"])


def test_too_few_samples():
    few = [(x * scale, y) for (x, y), scale in zip(POPULATION[:2], (1.0, 3.0), strict=True)]
    result = audit(healthy(), few, TEST)
    assert "too-few-samples" in [f.code for f in result.findings]
    assert result.halves.samples == BATCH


# ------------------------------------------------------------------------ numbers


def test_statistics_and_scores_are_those_of_the_parts():
    model = healthy()
    result = audit(model, POPULATION, TEST, methods=("exact", "pooled"), batch=True)
    exact = recompute_statistics(model, POPULATION)
    assert torch.equal(result.statistics["recomputed/exact"].mean["bn3"], exact.mean["bn3"])
    assert [str(r.condition) for r in result.comparison.results] == [
        "running", "recomputed/exact", "recomputed/pooled", "batch",
    ]  # fmt: skip
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in TEST)
    assert result.comparison.base.accuracy == right / 1000
    model.train()
    with torch.no_grad():
        right = sum(int((copy.deepcopy(model)(x).argmax(1) == y).sum()) for x, y in TEST)
    assert result.comparison.results[3].accuracy == right / 1000


def distance_of_bn1(a, b):
    apart = (a.mean["bn1"] - b.mean["bn1"]) / (b.var["bn1"] + 1e-5).sqrt()
    return float(apart.square().mean().sqrt())


def test_halves_are_disjoint_and_compared():
    model = healthy()
    result = audit(model, POPULATION[:8], TEST)
    a, b = (recompute_statistics(model, POPULATION[:8][i::2]) for i in (0, 1))
    assert result.halves.samples == 256 and result.population_samples == 512
    assert result.halves.worst_distance >= distance_of_bn1(a, b) > 0
    assert "disjoint halves of 256 samples" in str(result)


def test_of_a_large_population_two_parts_are_compared_unless_these_differ():
    model = healthy()
    result = audit(model, POPULATION * 2, TEST)
    assert result.halves.samples == 256 and result.population_samples == 2048
    assert "disjoint parts of 256 samples" in str(result)
    loud = [(x * (30.0 if i % 8 == 2 else 1.0), y) for i, (x, y) in enumerate(POPULATION * 2)]
    result = audit(model, loud, TEST)
    assert result.halves.samples == 1024, "then it is the halves that are spoken of"
    assert "too-few-samples" in [f.code for f in result.findings]


def test_a_curve_by_the_number_of_samples():
    model = healthy()
    result = audit(model, POPULATION[:9], TEST, curve=True)
    assert [p.samples for p in result.curve] == [64, 128, 192, 320, 256, 576]
    assert [p.part for p in result.curve] == ["nested"] * 4 + ["other half", "all"]
    parts = [[0], [0, 8], [0, 4, 8], [0, 2, 4, 6, 8], [1, 3, 5, 7], range(9)]
    for part, point in zip(parts, result.curve, strict=True):
        statistics = recompute_statistics(model, [POPULATION[i] for i in part])
        with statistics.applied_to(model), torch.no_grad():
            right = [(model(x).argmax(1) == y) for x, y in TEST]
        assert point.score == pytest.approx(float(torch.cat(right).double().mean()), abs=1e-12)
        assert point.test_samples == 1000
    whole, base = result.curve[-1], result.comparison.others[0][0]
    assert whole.score == base.accuracy and whole.gain.difference == whole.changed == 0
    for p in result.curve:
        assert p.gain.difference == pytest.approx(p.score - whole.score)
    assert result.halves.samples == 256 and result.halves.test_samples == 1000
    assert "From " in str(result) and "320" in str(result)


def test_samples_that_are_too_few_show_in_the_curve():
    """Each batch has a brightness of its own, so that a few of them are never enough."""
    uneven = [(x * (0.3 if i % 2 else 3.0), y) for i, (x, y) in enumerate(POPULATION)]
    result = audit(healthy(), uneven, TEST, curve=True)
    assert "Half of the population still scores otherwise" in str(result)


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_halves_of_a_loader_that_shuffles_are_disjoint_too(generator):
    from torch.utils.data import DataLoader, TensorDataset

    x, y = samples(240, 1)
    numbered = TensorDataset(x, y, torch.arange(240))
    loader = DataLoader(numbered, batch_size=20, shuffle=True, generator=generator)
    passes = []

    class Watched:
        def __iter__(self):
            passes.append([])
            for batch in loader:
                passes[-1].append(batch)
                yield batch

    Watched.generator = generator
    state = torch.get_rng_state()
    result = audit(healthy(), Watched(), TEST, samples=160)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.population_samples == 160 and result.halves.samples == 80
    orders = [torch.cat([b[2] for b in p]).tolist() for p in passes if len(p) >= 7]
    assert len(orders) >= 3, "all of them, and both halves"
    assert all(order == orders[0][: len(order)] for order in orders)
    assert orders[0] != sorted(orders[0])


def test_worst_layers_are_exchanged_in_both_directions():
    model = healthy()
    model.bn2.running_var.mul_(40)
    result = audit(model, POPULATION, TEST)
    (rows,) = result.comparison.layers.values()
    by_name = {row.name: row for row in rows}
    whole = result.comparison.others[0][1].difference
    assert by_name["bn2"].mended.difference == pytest.approx(whole, abs=0.03)
    assert by_name["bn2"].spoiled.difference == pytest.approx(-whole, abs=0.03)
    assert result.attribution.worst(1)[0].name == "bn2"


@pytest.mark.parametrize("kind", ["tensors", "tuples", "dicts", "own"])
def test_batches_as_data_loaders_give_them(kind):
    model = healthy()
    make = {
        "tensors": lambda x, y: x,
        "tuples": lambda x, y: (x, y, ["name"] * len(x)),
        "dicts": lambda x, y: {"image": x, "label": y, "id": torch.arange(len(x))},
        "own": lambda x, y: {"view": (x, "meta"), "truth": y},
    }[kind]
    population = [make(x, y) for x, y in POPULATION]
    test = TEST if kind == "tensors" else [make(x, y) for x, y in TEST]
    arguments = {}
    if kind == "own":
        arguments = {
            "forward": lambda model, batch: model(batch["view"][0]),
            "score": lambda output, batch: (output.argmax(1) == batch["truth"]).float(),
        }
    result = audit(model, population, test, batch=True, **arguments)
    expected = audit(model, POPULATION, TEST, batch=True)
    for a, b in zip(result.comparison.results, expected.comparison.results, strict=True):
        assert a.accuracy == b.accuracy


def test_a_score_of_ones_own():
    model = healthy()
    model.bn3.running_var.mul_(50)

    def margin(output, batch):
        y = batch[1][:, None]
        return output.gather(1, y)[:, 0] - output.scatter(1, y, -99.0).amax(1)

    result = audit(model, POPULATION, TEST, score=margin, score_name="margin")
    assert result.comparison.score == "margin" and result.comparison.classes == []
    assert "in margin" in result.verdict and "points" not in str(result)
    assert result.attribution is not None, "a score that has a gradient is a loss too"
    assert result.attribution.difference > 0
    json.dumps(result.comparison.to_dict(), allow_nan=False)
    json.dumps(result.to_dict(), allow_nan=False)


def test_another_domain_is_adapted_to_with_a_prior():
    """Images darkened and shifted: neither the source's statistics nor few of the target's."""
    model = healthy()
    x, y = samples(600, 5)
    dark = [(0.4 * a + 2, b) for a, b in zip(x.split(100), y.split(100), strict=True)]
    unlabelled = [a for a, _ in dark[:1]]
    result = audit(model, unlabelled, dark[1:], prior=20)
    running, recomputed, blended = result.comparison.results
    assert str(blended.condition) == "blended" and "20 of 120 samples" in blended.label
    assert recomputed.accuracy > running.accuracy + 0.2
    assert "inputs-differ" in harmful(result)
    own = running_statistics(model)
    target = recompute_statistics(model, unlabelled)
    expected = (20 * own.mean["bn1"].double() + 100 * target.mean["bn1"]) / 120
    assert torch.allclose(result.statistics["blended"].mean["bn1"], expected)
    result.mend(model)
    assert torch.equal(model.bn1.running_mean, result.statistics["blended"].mean["bn1"].float())


def test_it_is_shown_as_text_and_as_html(tmp_path):
    model = healthy()
    model.bn2.running_var.mul_(40)
    result = audit(model, POPULATION, TEST)
    text, html = str(result), result._repr_html_()
    for part in (result.summary, "lagging", "recomputed", "bn2"):
        assert part in text and part in html
    assert max(map(len, text.splitlines())) <= 120
    result.report(tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    result.save(tmp_path / "runs" / "mine-1")
    record = AuditRecord(tmp_path / "runs" / "mine-1")
    assert render_record(record) == (record.path / "report.html").read_text()
    with pytest.raises(UserError, match="exists"):
        result.save(record.path)


def test_a_last_batch_of_one_sample_under_batch_statistics():
    result = audit(healthy(), POPULATION, batches(201, 2, 100), batch=True)
    assert result.comparison.samples == 201


def test_what_cannot_be_audited():
    model = healthy()
    with pytest.raises(UserError, match="test is an iterator"):
        audit(model, POPULATION, iter(TEST))
    with pytest.raises(UserError, match="no labels"):
        audit(model, POPULATION, [x for x, _ in TEST])
    with pytest.raises(UserError, match="what of a dict with picture the model"):
        audit(model, [{"picture": POPULATION[0][0]}], TEST)
    with pytest.raises(UserError, match=r"logits \(N, classes\)"):
        audit(nn.Sequential(nn.BatchNorm2d(1)), POPULATION, TEST)
    with pytest.raises(UserError, match="no samples to test on"):
        audit(model, POPULATION, [])
    with pytest.raises(UserError, match="samples=0 must be"):
        audit(model, POPULATION, TEST, samples=0)
    with pytest.raises(UserError, match="method 'fast' is unknown"):
        audit(model, POPULATION, TEST, methods=("fast",))
    for given in (lambda output: output, lambda output: output.flatten(), lambda output: output[0]):
        with pytest.raises(UserError, match="a tensor \\(N,\\) with a number per sample"):
            audit(model, POPULATION, TEST, score=lambda output, batch, given=given: given(output))


def test_test_samples_in_another_order_in_every_pass_are_refused():
    """What exchanging a layer does is told from several passes, sample by sample."""

    class Shuffled:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(TEST[self.passes :] + TEST[: self.passes])

    model = healthy()
    model.bn3.running_mean += 3
    with pytest.raises(UserError, match="test is gone through several times"):
        audit(model, POPULATION, Shuffled())


@pytest.mark.parametrize("label", [0.5, float("nan")])
def test_labels_that_are_no_whole_numbers_are_not_cut_off(label):
    x, y = TEST[0]
    with pytest.raises(UserError, match="labels are no whole numbers: pass score="):
        audit(healthy(), POPULATION, [(x, torch.where(y == 1, label, y.float()))])


def test_one_number_per_sample_is_not_a_class_that_is_always_right():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(100, 1))
    with pytest.raises(UserError, match="gives one number per sample: pass score="):
        audit(model, POPULATION, [(x, torch.zeros_like(y)) for x, y in TEST])


def test_classes_that_are_not_those_of_the_model():
    """Sorted names are not its outputs where one is missing, whatever it happens to predict."""
    x, y = samples(200, 2)
    with pytest.raises(UserError, match="tells 4 classes apart, and there are 3 names of classes"):
        audit(healthy(), POPULATION, [(x, y * 0)], classes=("a", "b", "d"))


def test_batches_without_samples():
    model, none = healthy(), [(x[:0], y[:0]) for x, y in TEST[:1]]
    with pytest.raises(UserError, match="no samples to test on"):
        audit(model, POPULATION, none)
    result, expected = audit(model, none + POPULATION, none + TEST), audit(model, POPULATION, TEST)
    assert [r.accuracy for r in result.comparison.results] == [
        r.accuracy for r in expected.comparison.results
    ]


@pytest.mark.parametrize("broken", [1, 1000])
def test_outputs_that_are_not_finite_are_said(broken):
    """Also where all are, which looks like guessing."""
    x, y = samples(1000, 2)
    x[:broken] = float("nan")
    result = audit(healthy(), POPULATION, [(x, y)])
    said = f"{broken:,} of 1,000 outputs are not finite numbers; they count as wrong"
    assert said in " ".join(str(result).split()) and said in result._repr_html_()


def test_a_model_without_batchnorm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 4))
    result = audit(model, POPULATION, TEST)
    assert result.comparison.verdict.outcome == "alone"
    assert result.summary == "The model has no BN layer."
    with pytest.raises(UserError, match="nothing was recomputed"):
        result.mend(model)


def test_what_normalizes_in_place_of_bn_layers_is_named():
    model = nn.Sequential(FrozenBatchNorm2d(1), nn.Flatten(), nn.Linear(100, 4))
    said = "model has no BN layer of torch.nn; '0' (FrozenBatchNorm2d) keep statistics of their own"
    assert said in audit(model, POPULATION, TEST).summary
    with pytest.raises(UserError, match=re.escape(said)):
        recompute_statistics(model, [x for x, _ in POPULATION])


def test_statistics_of_layers_with_nan_do_not_stop_it():
    model = healthy()
    not_finite(model)
    model.bn1.running_mean[0] = float("nan")
    result = audit(model, POPULATION, TEST)
    assert set(result.findings[0].layers) == {"bn1", "bn2"}
    json.dumps([result.to_dict(), result.comparison.to_dict()], allow_nan=False)
    result.mend(model)
    assert isinstance(result.statistics["recomputed"], Statistics)
