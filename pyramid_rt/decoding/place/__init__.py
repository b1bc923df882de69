"""The place of a pyramid: its device, stream, lock and threads, and what of the process is put aside meanwhile."""

from pyramid_rt.decoding.place.places import (
    Callback,
    CudaPlace,
    HostPlace,
    Mark,
    Place,
    inside,
    place_for,
    threads_in,
)

__all__ = ["Callback", "CudaPlace", "HostPlace", "Mark", "Place", "inside", "place_for", "threads_in"]
