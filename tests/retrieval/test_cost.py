import pytest

from mrl.retrieval.metrics import mflops_per_query

IMAGENET_1K, IMAGENET_4K = 1_281_167, 4_202_000
DIMS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]

# Million multiply-adds per query of the paper's tables 11 and 12, by shortlist_dim: one value per rerank_dim from
# shortlist_dim to 2048. Source: RAIVNLab/MRL 9ab343f, Visualization/Adaptive Retrieval/PLOTS - Sheet6.csv, Sheet8.csv.
TABLE_11 = {
    8: [10.25, 10.25, 10.26, 10.26, 10.27, 10.3, 10.35, 10.45, 10.66],
    16: [20.5, 20.51, 20.51, 20.52, 20.55, 20.6, 20.7, 20.91],
    32: [41.0, 41.01, 41.02, 41.05, 41.1, 41.2, 41.41],
    64: [82.01, 82.02, 82.05, 82.1, 82.2, 82.4],
    128: [164.01, 164.04, 164.09, 164.19, 164.4],
    256: [328.03, 328.08, 328.18, 328.39],
    512: [656.06, 656.16, 656.37],
    1024: [1312.12, 1312.32],
    2048: [2624.24],
}
TABLE_12 = {
    8: [33.62, 33.62, 33.62, 33.63, 33.64, 33.67, 33.72, 33.82, 34.03],
    16: [67.24, 67.24, 67.24, 67.26, 67.28, 67.33, 67.44, 67.64],
    32: [134.47, 134.48, 134.49, 134.52, 134.57, 134.67, 134.87],
    64: [268.94, 268.95, 268.98, 269.03, 269.13, 269.34],
    128: [537.88, 537.91, 537.96, 538.06, 538.27],
    256: [1075.76, 1075.81, 1075.92, 1076.12],
    512: [2151.53, 2151.63, 2151.83],
    1024: [4303.05, 4303.26],
    2048: [8606.11],
}


@pytest.mark.parametrize(("table", "num_rows"), [(TABLE_11, IMAGENET_1K), (TABLE_12, IMAGENET_4K)])
def test_matches_every_row_of_the_papers_adaptive_retrieval(table, num_rows):
    rows = 0
    for shortlist_dim, published in table.items():
        rerank_dims = [dim for dim in DIMS if dim >= shortlist_dim]
        for rerank_dim, value in zip(rerank_dims, published, strict=True):
            cost = mflops_per_query(num_rows, shortlist_dim, [(rerank_dim, 200)])
            assert cost == pytest.approx(value, abs=0.00501), (shortlist_dim, rerank_dim)
            rows += 1
    assert rows == 45


@pytest.mark.parametrize(
    ("shortlist_dim", "lengths", "dims", "published"),
    # Table 13: RAIVNLab/MRL 9ab343f, Visualization/Adaptive Retrieval/PLOTS - Sheet7.csv.
    [
        (8, [800, 400, 200, 50, 10], [16, 32, 64, 128, 2048], 10.31),
        (16, [200, 100, 50, 25, 10], [32, 64, 128, 256, 2048], 20.54),
        (32, [200, 100, 50, 25, 10], [64, 128, 256, 512, 2048], 41.07),
    ],
)
def test_matches_the_papers_funnels(shortlist_dim, lengths, dims, published):
    stages = list(zip(dims, lengths, strict=True))
    assert mflops_per_query(IMAGENET_1K, shortlist_dim, stages) == pytest.approx(published, abs=0.00501)


def test_a_plain_search_costs_one_multiply_add_a_coordinate():
    assert mflops_per_query(500_000, 64) == 32.0
