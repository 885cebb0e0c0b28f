"""What sparsity costs, by our method and by those a user would pick instead, at equal steps.

    python -m benchmarks.quality run --data DIR --out OUT --preset small --jobs 2
    python -m benchmarks.quality run --data DIR --out OUT --networks edsr-8x32-x2 --methods dense gmp iks --seeds 0
    python -m benchmarks.quality run --data DIR --out OUT --rows docs/quality/results.csv --sparsities 0.9
    python -m benchmarks.quality dial --data DIR --out OUT --networks edsr-8x32-x2
    python -m benchmarks.quality report --out OUT
    python -m benchmarks.quality list

DIR holds RealSR_GT (photographs to train on), Set5/HR and Set5/LR_bicubic/X2 (test images and their small versions).
For each network and seed a dense network is trained and kept; every method starts from it and gets the same further
steps and batches. Each finished row is in OUT/results.csv at once: interrupt at will, the same command goes on.
"""
