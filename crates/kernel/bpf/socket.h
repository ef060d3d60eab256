/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Class and workload of a socket: set once, when the socket is made, and kept in the socket.
 */
#pragma once

#include <linux/in.h>

#include "address.h"
#include "maps.h"
#include "refuse.h"

SEC("cgroup/sock_create")
int heddle_sock_create(struct bpf_sock *ctx)
{
	__u32 type = CONTEXT_READ(ctx, type), protocol = CONTEXT_READ(ctx, protocol);
	struct socket_state fresh = {};
	struct socket_state *state;
	struct cgroup_entry *entry;
	struct workload_entry *workload;
	__u64 cgroup;

	/* Anything but TCP and UDP would carry bytes past policy. MPTCP's subflows are made inside the
	 * kernel, out of sight of this hook: programs fall back to TCP on this error. */
	if (!(type == 1 && (protocol == 0 || protocol == IPPROTO_TCP)) &&
	    !(type == 2 && (protocol == 0 || protocol == IPPROTO_UDP))) {
		count(REASON_PROTOCOL_NOT_CARRIED);
		return refuse_with(EPROTONOSUPPORT);
	}

	cgroup = bpf_get_current_cgroup_id();
	entry = bpf_map_lookup_elem(&cgroups, &cgroup);
	if (!entry) {
		count(REASON_NO_IDENTITY);
		return refuse_with(EACCES);
	}
	fresh.netns = bpf_get_netns_cookie(ctx);
	fresh.workload = entry->workload;
	fresh.socket_class = entry->socket_class;
	if (fresh.socket_class != CLASS_AGENT) {
		/* A process in the right cgroup but another namespace has no identity. */
		workload = bpf_map_lookup_elem(&workloads, &fresh.workload);
		if (!workload || workload->netns != fresh.netns) {
			count(REASON_NO_IDENTITY);
			return refuse_with(EACCES);
		}
	}
	state = bpf_sk_storage_get(&sockets, ctx, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state) {
		count(REASON_STATE_FULL);
		return refuse_with(EACCES);
	}
	return 1;
}
