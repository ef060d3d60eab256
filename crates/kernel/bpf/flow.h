/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Flow records into the ring buffer. The reader is woken only when a quarter of the buffer is full; it
 * also looks by itself a few times a second. A record that finds no room is counted as lost.
 */
#pragma once

#include "maps.h"

#define WAKE_UP_BYTES (1024 * 1024)

static __always_inline struct flow_event *flow_begin(__u8 kind, const struct grant *grant)
{
	struct flow_event *event = bpf_ringbuf_reserve(&flows, sizeof(*event), 0);

	if (!event) {
		count(REASON_EVENT_LOST);
		return 0;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->kind = kind;
	event->time_ns = bpf_ktime_get_ns();
	if (grant->start_ns)
		event->duration_ns = event->time_ns - grant->start_ns;
	event->original = grant->original;
	event->original_port = grant->original_port;
	event->source_workload = grant->source_workload;
	event->source_identity = grant->source;
	event->destination_workload = grant->destination_workload;
	event->policy = grant->policy;
	event->service = grant->service;
	event->reason = grant->reason;
	return event;
}

static __always_inline void flow_submit(struct flow_event *event)
{
	__u64 waiting = bpf_ringbuf_query(&flows, BPF_RB_AVAIL_DATA);

	bpf_ringbuf_submit(event, waiting > WAKE_UP_BYTES ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}
