/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The maps. Their sizes are defaults: the loader sets them from configuration.
 * Only `affinity` is an LRU: losing an entry of it costs stickiness, never a decision.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "types.h"

#define HASH(name, key_type, value_type, entries, flags)                                           \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_HASH);                                                   \
		__uint(max_entries, entries);                                                      \
		__uint(map_flags, flags);                                                          \
		__type(key, key_type);                                                             \
		__type(value, value_type);                                                         \
	} name SEC(".maps")

HASH(cgroups, __u64, struct cgroup_entry, 4096, BPF_F_NO_PREALLOC);
HASH(workloads, __u32, struct workload_entry, 1024, BPF_F_NO_PREALLOC);
HASH(addresses, struct address, struct address_entry, 65536, BPF_F_NO_PREALLOC);
HASH(services, struct service_key, struct service_entry, 65536, BPF_F_NO_PREALLOC);
HASH(slots, struct slot_key, struct slot_entry, 262144, BPF_F_NO_PREALLOC);
HASH(endpoints, __u32, struct endpoint_entry, 262144, BPF_F_NO_PREALLOC);
HASH(verdicts, struct verdict_key, struct verdict_entry, 262144, BPF_F_NO_PREALLOC);
HASH(capture, struct capture_key, __u32, 4096, BPF_F_NO_PREALLOC);
HASH(devices, __u32, struct device_entry, 1024, BPF_F_NO_PREALLOC);
HASH(handshakes, struct tuple, struct grant, 32768, 0);
HASH(datagrams, struct tuple, struct datagram_flow, 65536, BPF_F_NO_PREALLOC);

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity_entry);
} affinity SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct socket_state);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct peers);
} peers SEC(".maps");

HASH(splice_pairs, struct splice_connection, struct splice_pair, 16384, BPF_F_NO_PREALLOC);

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 32768);
	__type(key, struct splice_key);
	__type(value, __u32);
} splice_sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct splice_state);
} splices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 * 1024 * 1024);
	__type(value, struct flow_event); /* says how records are laid out; a ring has no values */
} flows SEC(".maps");

/* By workload: the agent's listener that the namespace's connections are steered to (steer.h). */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u32);
} inbound SEC(".maps");

/* An earlier version's `sockets` and `handshakes` (carry.h), whose values may be laid out differently. Without one
 * they are empty, and no program looks into them. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct socket_state);
} sockets_before SEC(".maps"), sockets_before_2 SEC(".maps");

HASH(handshakes_before, struct tuple, struct grant, 32768, 0);
HASH(handshakes_before_2, struct tuple, struct grant, 32768, 0);

/* How often each reason came up, per CPU. The upper half is user space's: the counts of maps that were replaced. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_COUNT * 2);
	__type(key, __u32);
#ifdef HEDDLE_TEST_LAYOUT
	__type(value, struct test_counter);
#else
	__type(value, __u64);
#endif
} reasons SEC(".maps");

static __always_inline void count(__u32 reason)
{
	__u64 *counter = bpf_map_lookup_elem(&reasons, &reason);

	if (counter)
		*counter += 1;
}
