/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The server's side: a packet reaches a workload's socket only if the socket is admitted, or if a grant (or a
 * verdict for anonymous peers) admits the handshake. An admitted packet costs one look into the socket.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "decide.h"
#include "flow.h"
#include "socket.h"

/* The identity id of peers that nobody vouches for. */
#define SOURCE_ANONYMOUS 0

static __always_inline int packet_tuple(struct __sk_buff *skb, struct tuple *t, __u8 *protocol)
{
	__u16 ports[2];
	__u32 offset;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr header;

		if (bpf_skb_load_bytes(skb, 0, &header, sizeof(header)))
			return 0;
		address_from_v4(&t->source, header.saddr);
		address_from_v4(&t->destination, header.daddr);
		*protocol = header.protocol;
		offset = header.ihl * 4;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr header;

		if (bpf_skb_load_bytes(skb, 0, &header, sizeof(header)))
			return 0;
		__builtin_memcpy(&t->source, &header.saddr, sizeof(t->source));
		__builtin_memcpy(&t->destination, &header.daddr, sizeof(t->destination));
		/* Extension headers end in a refusal: nothing in the mesh sends them. */
		*protocol = header.nexthdr;
		offset = sizeof(header);
	} else {
		return 0;
	}
	if (*protocol != IPPROTO_TCP && *protocol != IPPROTO_UDP)
		return 0;
	if (bpf_skb_load_bytes(skb, offset, ports, sizeof(ports)))
		return 0;
	t->source_port = bpf_ntohs(ports[0]);
	t->destination_port = bpf_ntohs(ports[1]);
	return 1;
}

static __always_inline int refuse_packet(struct __sk_buff *skb, const struct tuple *t, __u8 protocol,
					 const struct grant *grant, __u16 reason)
{
	struct flow_event *event;

	count(reason);
	event = flow_begin(FLOW_REFUSED_INGRESS, grant);
	if (!event)
		return 0;
	event->source = t->source;
	event->destination = t->destination;
	event->source_port = t->source_port;
	event->destination_port = t->destination_port;
	event->protocol = protocol;
	event->reason = reason;
	flow_submit(event);
	return 0;
}

static __always_inline int admit_anonymous(struct __sk_buff *skb, const struct tuple *t, __u8 protocol,
					   struct socket_state *state)
{
	struct grant grant = { .destination_workload = state->workload };
	struct address_entry *known = bpf_map_lookup_elem(&addresses, &t->source);
	struct verdict_entry *verdict;
	struct workload_entry *self;

	if (known)
		grant.source_workload = known->workload;
	/* A workload of this node always has a grant: without one it never passed its connect hook. */
	if (known && (known->flags & ADDRESS_LOCAL))
		return refuse_packet(skb, t, protocol, &grant, REASON_PEER_NOT_ATTESTED);
	self = bpf_map_lookup_elem(&workloads, &state->workload);
	if (!self)
		return refuse_packet(skb, t, protocol, &grant, REASON_NO_IDENTITY);
	/* Asked as an app's: the strictest class of clients. */
	verdict = find_verdict(SOURCE_ANONYMOUS, self->policy_set[address_family(&t->destination)],
			       t->destination_port, CLASS_APP, protocol);
	if (!verdict)
		return refuse_packet(skb, t, protocol, &grant, REASON_NO_VERDICT);
	grant.policy = verdict->policy;
	if (verdict->action != ACTION_DIRECT)
		return refuse_packet(skb, t, protocol, &grant, verdict->reason);
	return 1;
}

/* A socket that no sock_create saw (it was made before the programs were attached). */
static __always_inline struct socket_state *late_state(struct bpf_sock *socket)
{
	__u64 cgroup = bpf_sk_cgroup_id(socket);
	struct cgroup_entry *entry = bpf_map_lookup_elem(&cgroups, &cgroup);
	struct socket_state fresh = {};

	if (!entry)
		return 0;
	fresh.workload = entry->workload;
	fresh.socket_class = entry->socket_class;
	return bpf_sk_storage_get(&sockets, socket, &fresh, BPF_SK_STORAGE_GET_F_CREATE);
}

SEC("cgroup_skb/ingress")
int heddle_ingress(struct __sk_buff *skb)
{
	struct bpf_sock *socket = skb->sk;
	struct socket_state *state;
	struct tuple t = {};
	struct grant none = {}, *grant;
	__u8 protocol = 0;

	socket = socket ? bpf_sk_fullsock(socket) : 0;
	if (!socket)
		return 0;
	state = bpf_sk_storage_get(&sockets, socket, 0, 0);
	if (!state)
		state = late_state(socket);
	if (!state) {
		count(REASON_NO_IDENTITY);
		return 0;
	}
	if (state->socket_class == CLASS_AGENT)
		return 1;
	if ((state->flags & SOCKET_ADMITTED) && socket->state != BPF_TCP_LISTEN &&
	    socket->protocol == IPPROTO_TCP)
		return 1;
	if (!packet_tuple(skb, &t, &protocol))
		return refuse_packet(skb, &t, protocol, &none, REASON_PROTOCOL_NOT_CARRIED);
	/* Such packets cannot come from outside: the kernel drops them as martians. */
	if (address_is_loopback(&t.source) || address_is_loopback(&t.destination) ||
	    address_equal(&t.source, &t.destination))
		return 1;
	if (protocol == IPPROTO_UDP) {
		none.destination_workload = state->workload;
		return refuse_packet(skb, &t, protocol, &none, REASON_UDP_NOT_CARRIED);
	}
	grant = bpf_map_lookup_elem(&handshakes, &t);
	if (!grant)
		return admit_anonymous(skb, &t, protocol, state);
	if (grant->destination_workload != state->workload)
		return refuse_packet(skb, &t, protocol, grant, REASON_PEER_NOT_ATTESTED);
	return 1;
}
