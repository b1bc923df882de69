"""The server of openai_server.py with one replica per GPU, for who outgrows one machine: a Ray Serve deployment.

    pip install 'pyramid-rt[ray]'
    python examples/ray_serve.py --weights weights/smollm2 --port 8000

Queueing, balancing and starting dead replicas again are Ray's. Each replica decodes one sequence at a time, so that
it is given one, and one more to wait; what comes beyond waits at the proxy, and is refused with status 503 when too
much does. A request whose replica dies is answered with a status of 500 or above; the client may send it again.
"""

# No annotations as strings: Ray sends the class to the replicas, where FastAPI could not look their names up.
import argparse
import os
import signal
import threading
from typing import Any

import ray
import torch
from fastapi import FastAPI, Request, Response
from openai_server import chat_completion, completion
from ray import serve

import pyramid_rt

api = FastAPI(title="pyramid_rt")


@serve.deployment
@serve.ingress(api)
class Replica:
    """One pyramid on one GPU: Ray shows each replica only its own."""

    def __init__(self, weights: str, device: str | None) -> None:
        self._rt = pyramid_rt.load(weights, device=device)

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return self._signed(await completion(self._rt, request))

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return self._signed(await chat_completion(self._rt, request))

    @staticmethod
    def _signed(response: Response) -> Response:
        """Say which process answered, to see how requests are spread."""
        response.headers["x-replica"] = str(os.getpid())
        return response


def application(weights: str, device: str | None, replicas: int, waiting: int) -> Any:
    """The application for `serve.run`: so many replicas, a GPU for each where there are GPUs."""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    deployment = Replica.options(
        num_replicas=replicas,
        max_ongoing_requests=2,
        max_queued_requests=waiting,
        ray_actor_options={"num_gpus": 1} if on_gpu else {"num_cpus": 1},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
    )
    return deployment.bind(weights, device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a pyramid by Ray, one replica per GPU.")
    parser.add_argument(
        "--weights", default=str(pyramid_rt.demo_weights()), help="weights directory (the demo's)"
    )
    parser.add_argument("--device", help="cuda or cpu; CUDA where there is one")
    parser.add_argument("--replicas", type=int, default=max(1, torch.cuda.device_count()), help="one per GPU")
    parser.add_argument("--waiting", type=int, default=200, help="most requests that wait at the proxy (200)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")
    parser.add_argument(
        "--address", help="of a Ray cluster to join; by default one is started on this machine"
    )
    given = parser.parse_args()
    if given.address is None:
        # A cluster of this machine alone, which nobody else can reach.
        cores = max(os.cpu_count() or 1, given.replicas)
        ray.init(num_cpus=cores, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    else:
        ray.init(given.address)
    serve.start(http_options={"host": given.host, "port": given.port})
    weights = os.path.abspath(given.weights)
    serve.run(application(weights, given.device, given.replicas, given.waiting))
    print(f"serving at http://{given.host}:{given.port}/v1", flush=True)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    over.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
