"""One engine in a process of its own, run by `inference.py`; needs NumPy and the engine, and no PyTorch.

    python benchmarks/inference_worker.py ENGINE NETWORK.onnx IMAGE.npy OUTPUT.npy THREADS

ENGINE is onnxruntime, openvino or deepsparse. The engine runs once, its output is written to OUTPUT.npy, and a line of
JSON says which engine it is. Each line `run N` that comes in is then answered by a line of JSON, the seconds of N runs.
Whatever the engine itself prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Engine = tuple[str, Callable[[Image], Any]]


def load_onnxruntime(path: str, threads: int) -> Engine:
    onnxruntime: Any = importlib.import_module("onnxruntime")

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return f"ONNX Runtime {onnxruntime.__version__}", lambda image: session.run(None, {name: image})[0]


def load_openvino(path: str, threads: int) -> Engine:
    openvino: Any = importlib.import_module("openvino")

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = openvino.Core().compile_model(path, "CPU", settings)
    return f"OpenVINO {openvino.__version__.split('-')[0]}", lambda image: network([image])[0]


def load_deepsparse(path: str, threads: int) -> Engine:
    os.environ["NM_DISABLE_ANALYTICS"] = "True"
    deepsparse: Any = importlib.import_module("deepsparse")

    engine = deepsparse.compile_model(path, batch_size=1, num_cores=threads)
    return f"DeepSparse {deepsparse.__version__}", lambda image: engine([image])[0]


ENGINES = {"onnxruntime": load_onnxruntime, "openvino": load_openvino, "deepsparse": load_deepsparse}


def main() -> None:
    engine, network, image_path, output_path, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, run = ENGINES[engine](network, int(threads))
    image: Image = np.load(image_path)
    np.save(output_path, run(image))
    print(json.dumps(name), file=answers)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line.removeprefix("run"))):
            start = time.perf_counter()
            run(image)
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), file=answers)


if __name__ == "__main__":
    main()
