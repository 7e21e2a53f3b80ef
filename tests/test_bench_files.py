"""The benchmarks that go through files, at tiny sizes: they run, compare, and print their tables."""

import re

from benchmarks import bench_end_to_end, bench_loader


def test_a_whole_evaluation_against_the_published_one(capsys):
    size = "--vit nano --image_size 32 --med_config configs/med_small.json --gallery 12 36 --k 5 --workers 0"
    bench_end_to_end.main([*size.split(), "--queries", "3"])
    out = capsys.readouterr().out
    assert float(re.search(r"ten best scores of 6 queries: (\S+)", out)[1]) < 1e-4
    assert len(re.findall(r"^\| published.*\| \d+\.\d \|$", out, re.MULTILINE)) == 5
    assert re.search(r"\*\*this repository\*\*, [\d.]+ times faster", out)


def test_the_shares_of_loading(capsys):
    bench_loader.main(["--image_size", "64", "--images", "32", "--workers", "0"])
    out = capsys.readouterr().out
    for stage in ("decode", "RandomResizedCrop", "RandomAugment", "ToTensor", "Normalize", "Resize"):
        assert re.search(rf"^\| {stage} \| [\d.]+ \| \d+ % \|$", out, re.MULTILINE), stage
    rates = re.search(r"^\| 0 \| (\d+) \| (\d+) \|$", out, re.MULTILINE)
    assert int(rates[1]) > 0 and int(rates[2]) > 0
    shares = [int(share) for share in re.findall(r"(\d+) % \|", out)]
    assert abs(sum(shares) - 200) <= 5
