"""Examples of every method's request and reply."""

from __future__ import annotations

import msgspec

from intercept_protocol import codec, events, rpc
from intercept_protocol import messages as m
from intercept_protocol.outcomes import Access
from intercept_protocol.trace import ANSWERS, REGION_KINDS, SOURCES
from wire_vectors.forms import ExchangeVector, as_json, map_as_json

TOKEN = bytes(range(16))
FEATURES: dict[str, object] = {
    "address_spaces": list(m.ADDRESS_SPACES),
    "hypervisors": list(m.HYPERVISORS),
    "architectures": list(m.Architecture),
    "kept": False,
}
LIMITS = {
    "memory_mib": 1024, "message_bytes": 65_536, "request_bytes": 1280, "request_values": 256,
    "request_values_vmm": 2048, "requests_in_flight_per_connection": 1,
    "connections_per_uid": 32_768, "control_requests_per_second": 10_000, "connections_without_hello": 512,
    "hello_timeout_ms": 5000, "invalidate_timeout_ms": 5000, "hypervisor_timeout_ms": 5000,
    "vmms_per_uid": 2048, "partitions_per_uid": 1024, "vps_per_uid": 16_384, "regions_per_uid": 1 << 20,
    "mappings_per_uid": 1 << 20, "vmas_per_uid": 1 << 20,
    "unclosed_descriptors_per_uid": 512,
    "vps_per_partition": 256, "notifiers_per_partition": 64, "regions_per_partition": 1 << 20,
    "mappings_per_partition": 1 << 20, "vmas_per_partition": 1 << 20,
    "open_invalidations_per_partition": 1024, "deposit_pages_per_partition": 1 << 20, "operators": 32,
}  # fmt: skip
"""The defaults of section 10 of the specification."""


def methods() -> list[ExchangeVector]:
    range_ = {"start_uaddr": 0x7F0000000000, "length": 0x4000}
    bar = {"start_gfn": 0xFEB00, "page_count": 16, "start_uaddr": 0x7F0000000000}
    buckets = (1, 0, 1, 1, *[0] * (m.LATENCY_BUCKETS - 4))
    waited = (0, 0, 0, 1, *[0] * (m.LATENCY_BUCKETS - 4))
    summary = m.PartitionSummary(
        partition_id=1, name="guest-a", uid=1000, pid=4242, address_space="declared", hypervisor="software",
        vps=1, regions=1, mapped_gfns=16, intercepts=3, invalidations=0, age_ms=1500,
        latency=buckets, latency_waited=waited, watch=m.MemoryWatch.DECLARED,
    )  # fmt: skip
    unwatched = msgspec.structs.replace(
        summary, partition_id=2, pid=0, address_space="process", hypervisor="vmm", watch=m.MemoryWatch.NONE,
        open_invalidations=3, oldest_invalidation_ms=4_700, waiting_vps=1, memory_bytes=215_808,
    )  # fmt: skip
    to_be_restored = msgspec.structs.replace(
        summary, partition_id=3, pid=0, address_space="image", hypervisor="userfaultfd", vps=0, regions=0,
        mapped_gfns=0, intercepts=0, latency=(), latency_waited=(), watch="", restore=m.RestoreState.WAITING,
    )  # fmt: skip
    intercepts = {"resume": {"mapped": 1, "already_mapped": 1}, "forward": {"no_region": 1}}
    counters = m.PartitionStatistics(
        regions=1, vmas=1, vps=1, open_invalidations=0, mapped_gfns=16, no_access_gfns=0, slat_extents=1,
        map_calls=1, unmap_calls=0, deposits=0, invalidations=0, stale_attempts=0, split_large_pages=2,
        restarts=3, intercepts=intercepts,
        latency=buckets, latency_waited=waited,
    )  # fmt: skip
    region = m.RegionView(
        **bar, kind=m.RegionKind.MMIO, state="live", writable=True, executable=False, mapped_gfns=16
    )
    vma = m.VmaView(
        start_uaddr=0x7F0000000000, page_count=16, start_pfn=0xC0000, readable=True, writable=True,
        executable=False, io=True,
    )  # fmt: skip
    vmas = m.VmaPage(vmas=[vma], more=True)
    mapping = m.MappingView(**bar, frame=("host", 0xC0000), access=int(Access.READ | Access.WRITE))
    mappings = m.MappingPage(mappings=[mapping], more=True)
    inspection = m.PartitionInspection(
        summary=summary, architecture=m.Architecture.X86_64, mmio_granularity=m.MmioGranularity.VMA,
        statistics=counters,
        regions=[region], virtual_processors=[m.VpView(vp_index=0, state="running", intercepts=3)],
        notifiers=1,
    )  # fmt: skip
    silent = m.PartitionInspection(
        summary=unwatched, architecture=m.Architecture.X86_64, mmio_granularity=m.MmioGranularity.VMA,
        statistics=msgspec.structs.replace(counters, unresolved={"unattached": 1, "unannounced": 2}),
        regions=[], virtual_processors=[], notifiers=0, hypervisor_connected=False, userfaultfd_errno=1,
    )  # fmt: skip
    daemon = m.DaemonStatistics(
        uptime_ms=90_000, partitions=1, vps=1, connections=3, connections_without_hello=0, tasks=12,
        partitions_created=1, partitions_lost=0, connections_refused=0, intercepts=intercepts,
        invalidations=0, latency=buckets, latency_waited=waited,
    )  # fmt: skip
    scraped = msgspec.structs.replace(daemon, scrapes=4)
    vp = m.VpHistogram(
        vp_index=3, intercepts=3, total_ns=14_200, buckets=buckets, waited_ns=9_400, waited_buckets=waited,
    )  # fmt: skip
    histograms = m.HistogramPage(
        boundaries_ns=tuple(1000 << n for n in range(1, m.LATENCY_BUCKETS)),
        virtual_processors=[vp],
        more=True,
    )
    waiting = m.RestoreStatistics(
        state=m.RestoreState.WAITING, image_pages=1 << 15, pages_in=0, demand_pages=0, around_pages=0,
        prefetched_pages=0, zero_pages=0, removed_pages=0, faults=0, retries=0, image_errors=0,
        error="no known hand-off starts with the bytes 47 45 54 20 2f",
    )  # fmt: skip
    serving = m.RestoreStatistics(
        state=m.RestoreState.SERVING, image_pages=1 << 15, pages_in=1290, demand_pages=20, around_pages=1260,
        prefetched_pages=10, zero_pages=64, removed_pages=256, faults=21, retries=2, image_errors=1,
        age_ms=1500, first_fault_ms=3, quiet_ms=1400, pid=4242, latency=buckets, oldest_fault_ms=12,
    )  # fmt: skip
    hello = m.HelloReply(
        protocol=1, server="interceptd", version="0.1.0",
        limits=LIMITS, features=FEATURES,
    )  # fmt: skip
    declared, process = m.AddressSpaceKind.DECLARED, m.AddressSpaceKind.PROCESS
    software, vmm = m.HypervisorKind.SOFTWARE, m.HypervisorKind.VMM
    cases: list[tuple[str, str, m.Call[object], object]] = [
        ("vmm", "plain", m.HelloVmm(), hello),
        ("vmm", "named", m.HelloVmm(name="guest-a"), hello),
        ("vp", "plain", m.HelloVp(partition_id=1, vp_index=0, token=TOKEN), hello),
        ("notifier", "plain", m.HelloNotifier(partition_id=1, token=TOKEN), hello),
        ("hypervisor", "plain", m.HelloHypervisor(partition_id=1, token=TOKEN), hello),
        ("operator", "plain", m.HelloOperator(), hello),
        ("vmm", "declared, software", m.CreatePartition(address_space=declared, hypervisor=software),
         m.PartitionCredentials(partition_id=1, token=TOKEN)),
        ("vmm", "process, vmm, every field",
         m.CreatePartition(
             address_space=process, hypervisor=vmm, architecture=m.Architecture.ARM64, remap=m.Remap.ERROR,
             mmio_granularity=m.MmioGranularity.PAGE, deposit_pages=512, invalidate_timeout_ms=250),
         m.PartitionCredentials(partition_id=2**53 + 1, token=TOKEN)),
        ("vmm", "auto", m.AddRegion(**bar, kind=m.RequestedKind.AUTO, writable=True, executable=False),
         m.AddRegionReply(kind=m.RegionKind.MMIO)),
        ("vmm", "largest numbers",
         m.AddRegion(start_gfn=2**52 - 1, page_count=1, start_uaddr=2**64 - 4096,
                     kind=m.RequestedKind.MOVABLE, writable=False, executable=True),
         m.AddRegionReply(kind=m.RegionKind.MOVABLE)),
        ("vmm", "plain", m.RemoveRegion(**bar), None),
        ("vmm", "device memory",
         m.MapVma(start_uaddr=0x7F0000000000, page_count=16, start_pfn=0xC0000, readable=True, writable=True,
                  executable=False, io=True), None),
        ("vmm", "plain", m.UnmapVma(start_uaddr=0x7F0000004000, page_count=4), None),
        ("vmm", "made read-only",
         m.ProtectVma(start_uaddr=0x7F0000000000, page_count=4, readable=True, writable=False,
                      executable=False), None),
        ("vmm", "one VP", m.Kick(vp_index=0), None),
        ("vmm", "all VPs", m.Kick(vp_index=m.VpSelection.ALL), None),
        ("vmm", "nothing changes", m.SetPolicy(), None),
        ("vmm", "page by page", m.SetPolicy(mmio_granularity=m.MmioGranularity.PAGE), None),
        ("vmm", "plain", m.Statistics(), counters),
        ("vmm", "mapped", m.Translate(gfn=0xFEB03),
         m.Translation(frame=("host", 0xC0003), access=int(Access.READ | Access.WRITE), pfn=0xC0003)),
        ("vmm", "not reachable", m.Translate(gfn=0xFFFFF), None),
        ("notifier", "plain", m.InvalidateBegin(**range_), None),
        ("notifier", "plain", m.InvalidateEnd(**range_), None),
        ("notifier", "plain", m.Invalidate(**range_), None),
        ("hypervisor", "declared", m.MapGpa(**bar, start_pfn=0xC0000, access=3), None),
        ("hypervisor", "process", m.MapGpa(**bar, access=7), None),
        ("hypervisor", "plain", m.UnmapGpa(start_gfn=0xFEB00, page_count=16), None),
        ("operator", "first page", m.ListPartitions(),
         m.PartitionList(partitions=[summary, to_be_restored], more=False)),
        ("operator", "next page", m.ListPartitions(after=128), m.PartitionList(partitions=[], more=False)),
        ("operator", "plain", m.InspectPartition(partition_id=1), inspection),
        ("operator", "plain", m.OperatorStatistics(), daemon),
        ("operator", "page by page",
         m.OperatorSetPolicy(partition_id=1, mmio_granularity=m.MmioGranularity.PAGE), None),
        ("operator", "plain", m.Drain(timeout_ms=5000), None),
        ("operator", "first page", m.Histograms(partition_id=1), histograms),
        ("operator", "next page", m.Histograms(partition_id=1, after=3),
         m.HistogramPage(boundaries_ns=histograms.boundaries_ns, virtual_processors=[], more=False)),
        ("vmm", "no promise", m.AttachMemory(), None),
        ("vmm", "promised", m.AttachMemory(promise_begin_end=True), None),
        ("operator", "every event", m.Subscribe(events=list(events.EventName)), None),
        ("operator", "one VP's failures",
         m.Subscribe(events=[events.EventName.INTERCEPT_ANSWERED], partition_id=1, vp_index=3,
                     reasons=[events.Reason.NO_PROGRESS, events.Reason.HYPERVISOR_ERROR]), None),
        ("operator", "no longer", m.Subscribe(events=[]), None),
        ("vmm", "a shared file", m.Translate(gfn=0x100),
         m.Translation(frame=("file 0:1:1374", 7), access=int(Access.READ | Access.WRITE))),
        ("vmm", "a System V segment", m.Translate(gfn=0x101),
         m.Translation(frame=("sysv 0:1:32768", 0), access=int(Access.READ))),
        ("vmm", "memory of its own", m.Translate(gfn=0x102),
         m.Translation(frame=("anonymous", 0x7F0000102), access=int(Access.READ | Access.WRITE))),
        ("vmm", "memory and a device",
         m.MapVmas(vmas=[
             m.MapVma(start_uaddr=0x7F0000000000, page_count=16, start_pfn=0x100000, readable=True,
                      writable=True, executable=True, io=False),
             m.MapVma(start_uaddr=0x7F0000010000, page_count=1, start_pfn=0xC0000, readable=True,
                      writable=True, executable=False, io=True),
         ]), None),
        ("hypervisor", "lists", m.HelloHypervisor(partition_id=1, token=TOKEN, lists=True), hello),
        ("hypervisor", "NO_ACCESS and a window",
         m.MapGpas(pieces=[m.MapGpa(start_gfn=0x200, page_count=512, start_uaddr=0x7F0000200000, access=0),
                           m.MapGpa(**bar, start_pfn=0xC0000, access=3)]), None),
        ("hypervisor", "two pieces",
         m.UnmapGpas(pieces=[m.UnmapGpa(start_gfn=0xFEB00, page_count=16),
                             m.UnmapGpa(start_gfn=0xFEB20, page_count=1)]), None),
        ("vmm", "all of a region", m.Prefault(start_gfn=0xFEB00, page_count=16),
         m.PrefaultReply(page_count=16, mapped_gfns=16)),
        ("vmm", "a part of a region", m.Prefault(start_gfn=0, page_count=2**52),
         m.PrefaultReply(page_count=2**21, mapped_gfns=2**21 - 1)),
        ("vmm", "first page", m.ListRegions(), m.RegionPage(regions=[region], more=True)),
        ("vmm", "next page", m.ListRegions(after=0xFEB00), m.RegionPage(regions=[], more=False)),
        ("vmm", "first page", m.ListVmas(), vmas),
        ("vmm", "next page", m.ListVmas(after=0x7F0000000000), m.VmaPage(vmas=[], more=False)),
        ("vmm", "first page", m.ListMappings(), mappings),
        ("vmm", "next page", m.ListMappings(after=0xFEB00), m.MappingPage(mappings=[], more=False)),
        ("operator", "first page", m.OperatorListRegions(partition_id=1),
         m.RegionPage(regions=[region], more=True)),
        ("operator", "next page", m.OperatorListRegions(partition_id=1, after=0xFEB00),
         m.RegionPage(regions=[], more=False)),
        ("operator", "first page", m.OperatorListVmas(partition_id=1), vmas),
        ("operator", "next page", m.OperatorListVmas(partition_id=1, after=0x7F0000000000),
         m.VmaPage(vmas=[], more=False)),
        ("operator", "first page", m.OperatorListMappings(partition_id=1), mappings),
        ("operator", "next page", m.OperatorListMappings(partition_id=1, after=0xFEB00),
         m.MappingPage(mappings=[], more=False)),
        ("notifier", "plain", m.Kick(vp_index=3), None),
        ("vmm", "a BAR moves",
         m.ChangeRegions(
             remove=[m.RemoveRegion(**bar)],
             add=[m.AddRegion(**bar | {"start_gfn": 0xFEC00}, kind=m.RequestedKind.AUTO, writable=True,
                              executable=False)]),
         m.ChangeRegionsReply(kinds=[m.RegionKind.MMIO])),
        ("vmm", "nothing", m.ChangeRegions(), m.ChangeRegionsReply(kinds=[])),
        ("operator", "plain", m.Restart(), None),
        ("vmm", "no userfaultfd", m.AttachMemory(promise_begin_end=False, userfaultfd_errno=1), None),
        ("operator", "metrics are served", m.OperatorStatistics(), scraped),
        ("operator", "not watched", m.InspectPartition(partition_id=2), silent),
        ("operator", "plain", m.Trace(partition_id=1),
         m.TraceBegun(records=262144, record_size=64, answers=ANSWERS, sources=SOURCES,
                      region_kinds=REGION_KINDS)),
        ("vmm", "a list of pages", m.Restore(prefetch=True),
         m.RestoreReply(partition_id=1, image_pages=1 << 15)),
        ("vmm", "every field",
         m.Restore(around_pages=512, on_image_error=m.OnImageError.KILL, connect_timeout_ms=3_600_000,
                   prefetch=True, trace=True),
         m.RestoreReply(partition_id=2**53 + 1, image_pages=1)),
        ("vmm", "serving", m.RestoreProgress(partition_id=1), serving),
        ("vmm", "nobody connected yet", m.RestoreProgress(partition_id=1), waiting),
    ]  # fmt: skip
    return [_exchange(msgid, *case) for msgid, case in enumerate(cases, start=1)]


def _exchange(msgid: int, role: str, name: str, call: m.Call[object], reply: object) -> ExchangeVector:
    fields = codec.to_fields(call)
    result = codec.to_fields(reply) if isinstance(reply, msgspec.Struct) else reply
    return ExchangeVector(
        role=role,
        method=call.METHOD,
        name=name,
        msgid=msgid,
        fields=map_as_json(fields),
        request=rpc.encode_request(msgid, call.METHOD, [fields]).hex(),
        result=as_json(result),
        reply=rpc.encode_result(msgid, result).hex(),
    )
