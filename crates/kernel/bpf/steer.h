/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Steering: which of a workload's connections from outside of the node go to the agent's listener, whatever port they
 * ask for. Attached to the workload's network namespace, and asked only where no connection stands yet. It chooses
 * a listener and admits nobody: that is ingress.h's, for whatever is let pass here.
 */
#pragma once

#include <linux/in.h>

#include "address.h"
#include "carry.h"
#include "decide.h"

static __always_inline void lookup_tuple(struct bpf_sk_lookup *ctx, struct tuple *t)
{
	if (CONTEXT_READ(ctx, family) == AF_INET) {
		address_from_v4(&t->source, CONTEXT_READ(ctx, remote_ip4));
		address_from_v4(&t->destination, CONTEXT_READ(ctx, local_ip4));
	} else {
		t->source.word[0] = CONTEXT_READ(ctx, remote_ip6[0]);
		t->source.word[1] = CONTEXT_READ(ctx, remote_ip6[1]);
		t->source.word[2] = CONTEXT_READ(ctx, remote_ip6[2]);
		t->source.word[3] = CONTEXT_READ(ctx, remote_ip6[3]);
		t->destination.word[0] = CONTEXT_READ(ctx, local_ip6[0]);
		t->destination.word[1] = CONTEXT_READ(ctx, local_ip6[1]);
		t->destination.word[2] = CONTEXT_READ(ctx, local_ip6[2]);
		t->destination.word[3] = CONTEXT_READ(ctx, local_ip6[3]);
	}
	t->source_port = bpf_ntohs(ctx->remote_port);
	t->destination_port = CONTEXT_READ(ctx, local_port);
}

/* The workload whose connections the agent must look at, or 0 if this one is not for it. */
static __always_inline __u32 steered_workload(const struct tuple *t)
{
	struct address_entry *known;
	struct verdict_entry *verdict;
	struct workload_entry *self;
	struct grant carried = {};
	__u32 workload;

	if (t->destination_port == PORT_OUTBOUND || t->destination_port == PORT_INBOUND ||
	    t->destination_port == PORT_HBONE)
		return 0;
	/* Within the workload. By its own address such connections do not arrive on the loopback device, but on the veth. */
	if (address_is_loopback(&t->source) || address_equal(&t->source, &t->destination))
		return 0;
	/* A workload of this node was judged where it connected. */
	known = bpf_map_lookup_elem(&addresses, &t->source);
	if (known && (known->flags & ADDRESS_LOCAL))
		return 0;
	known = bpf_map_lookup_elem(&addresses, &t->destination);
	if (!known || !(known->flags & ADDRESS_LOCAL))
		return 0;
	workload = known->workload;
	self = bpf_map_lookup_elem(&workloads, &workload);
	if (!self)
		return 0;
	verdict = find_verdict(SOURCE_ANONYMOUS, self->policy_set[address_family(&t->destination) & 1],
			       t->destination_port, CLASS_APP);
	if (!verdict || verdict->action != ACTION_AGENT)
		return 0;
	/* What the agent itself delivers. */
	if (find_grant(t, &carried))
		return 0;
	return workload;
}

SEC("sk_lookup")
int heddle_steer(struct bpf_sk_lookup *ctx)
{
	struct bpf_sock *listener;
	struct tuple t = {};
	__u32 workload;
	long error;

	if (CONTEXT_READ(ctx, protocol) != IPPROTO_TCP)
		return SK_PASS;
	lookup_tuple(ctx, &t);
	workload = steered_workload(&t);
	if (!workload)
		return SK_PASS;
	/* The one entered may be any of a group that shares a port: the kernel spreads over the group. */
	listener = bpf_map_lookup_elem(&inbound, &workload);
	if (!listener) {
		count(REASON_NO_CAPTURE_TARGET);
		return SK_DROP;
	}
	error = bpf_sk_assign(ctx, listener, 0);
	bpf_sk_release(listener);
	if (error) {
		count(REASON_NO_CAPTURE_TARGET);
		return SK_DROP;
	}
	return SK_PASS;
}
