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

#include "carry.h"
#include "datagram.h"
#include "decide.h"
#include "flow.h"
#include "socket.h"

/* RFC 9293, 3.1 */
#define TCP_FLAGS_OFFSET 13
#define TCP_FLAG_SYN_BIT 2

/* Also the length of the headers up to the transport's. */
static __always_inline int packet_tuple(struct __sk_buff *skb, struct tuple *t, __u8 *protocol,
					__u32 *headers)
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
	*headers = offset;
	return 1;
}

static __always_inline int refuse_packet(const struct tuple *t, __u8 protocol,
					 struct socket_state *state, const struct grant *grant,
					 __u16 reason)
{
	struct flow_event *event;

	count(reason);
	if (protocol == IPPROTO_UDP && !record_refusal(state))
		return 0;
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

static __always_inline int admit_anonymous(const struct tuple *t, __u8 protocol,
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
		return refuse_packet(t, protocol, state, &grant, REASON_PEER_NOT_ATTESTED);
	self = bpf_map_lookup_elem(&workloads, &state->workload);
	if (!self)
		return refuse_packet(t, protocol, state, &grant, REASON_NO_IDENTITY);
	/* Asked as an app's: the strictest class of clients. */
	verdict = find_verdict(SOURCE_ANONYMOUS, self->policy_set[address_family(&t->destination)],
			       t->destination_port, CLASS_APP);
	if (!verdict)
		return refuse_packet(t, protocol, state, &grant, REASON_NO_VERDICT);
	grant.policy = verdict->policy;
	if (verdict->action != ACTION_DIRECT)
		return refuse_packet(t, protocol, state, &grant, verdict->reason);
	return 1;
}

/* A datagram at a socket that has not asked for it: the socket is a server's. The sender's address is vouched for by
 * the guard on its veth (spoof.h), so its identity is that of the workload that has the address. */
static __always_inline int admit_datagram(const struct tuple *t, struct socket_state *state,
					  __u32 bytes)
{
	__u32 family = address_family(&t->destination);
	struct address_entry *known = bpf_map_lookup_elem(&addresses, &t->source);
	struct grant grant = { .destination_workload = state->workload,
			       .original = t->destination,
			       .original_port = t->destination_port };
	struct workload_entry *from, *self;
	struct verdict_entry *verdict;
	__u16 reason = REASON_NO_VERDICT;

	if (!known || !(known->flags & ADDRESS_LOCAL)) {
		if (!admit_anonymous(t, IPPROTO_UDP, state))
			return 0;
		count_request(datagram_flow(t, &grant), bytes);
		return 1;
	}
	grant.source_workload = known->workload;
	from = bpf_map_lookup_elem(&workloads, &grant.source_workload);
	self = bpf_map_lookup_elem(&workloads, &state->workload);
	if (from && self) {
		grant.source = from->source[family & 1];
		verdict = find_verdict(grant.source, self->policy_set[family & 1],
				       t->destination_port, CLASS_APP);
		if (verdict) {
			grant.policy = verdict->policy;
			grant.reason = verdict->reason;
			reason = verdict->reason;
			if (verdict->action == ACTION_DIRECT) {
				count_request(datagram_flow(t, &grant), bytes);
				return 1;
			}
		}
	}
	return refuse_packet(t, IPPROTO_UDP, state, &grant, reason);
}

static __always_inline int datagram_in(struct __sk_buff *skb, struct bpf_sock *socket,
				       const struct tuple *t, struct socket_state *state,
				       __u32 headers)
{
	__u32 bytes = skb->len - headers - sizeof(struct udphdr);
	__u64 now = bpf_ktime_get_ns();
	struct peer *peer;

	/* A connected socket gets only what its peer sends (the kernel sees to that), and was allowed to ask it. */
	if (socket->state == BPF_TCP_ESTABLISHED &&
	    (state->flags & (SOCKET_ADMITTED | SOCKET_REPLIES)) == SOCKET_ADMITTED) {
		count_answer(t, &state->grant, bytes);
		return 1;
	}
	peer = find_peer(socket, &t->source, t->source_port, now);
	if (peer) {
		peer->last_ns = now;
		count_answer(t, 0, bytes);
		return 1;
	}
	return admit_datagram(t, state, bytes);
}

static __always_inline int is_syn(struct __sk_buff *skb, __u32 headers)
{
	__u8 flags;

	return !bpf_skb_load_bytes(skb, headers + TCP_FLAGS_OFFSET, &flags, sizeof(flags)) &&
	       (flags & TCP_FLAG_SYN_BIT);
}

/* The agent's listeners judge for themselves, but for handshakes whose grant has found no room: dropped, they are tried
 * again, and the grant is, too (tcp.h). */
static __always_inline int agent_listens(struct __sk_buff *skb, struct bpf_sock *socket)
{
	struct grant carried = {};
	struct tuple t = {};
	__u32 headers = 0;
	__u8 protocol = 0;

	/* Its own delivery, which steering has taken for a stranger's: it would be delivered again. */
	if ((skb->mark & DELIVERY_MASK) == DELIVERY_MARK)
		return 0;
	/* Here is nothing for strangers. */
	if (socket->src_port != PORT_OUTBOUND || !packet_tuple(skb, &t, &protocol, &headers) ||
	    !is_syn(skb, headers) || find_grant(&t, &carried))
		return 1;
	count(REASON_PEER_NOT_ATTESTED);
	return 0;
}

/* A segment at a listener from a workload of this node, whose connection is gone: the kernel answers it with a reset.
 * Were it dropped instead, a peer that missed the first reset would wait for ever. It opens nothing: that takes a SYN,
 * or a forged cookie, which accept_grant() leaves without admission. */
static __always_inline int is_late(struct __sk_buff *skb, struct bpf_sock *socket,
				   const struct tuple *t, __u32 headers)
{
	struct address_entry *known;

	if (socket->state != BPF_TCP_LISTEN || is_syn(skb, headers))
		return 0;
	known = bpf_map_lookup_elem(&addresses, &t->source);
	return known && (known->flags & ADDRESS_LOCAL);
}

static __always_inline int segment_in(struct __sk_buff *skb, struct bpf_sock *socket,
				      const struct tuple *t, struct socket_state *state,
				      __u32 headers)
{
	struct grant carried = {}, *grant = find_grant(t, &carried);

	if (!grant)
		return is_late(skb, socket, t, headers) || admit_anonymous(t, IPPROTO_TCP, state);
	OPAQUE(grant);
	/* What the agent delivers bears its mark, which nothing from the wire does, whatever address it claims. */
	if (grant->destination_workload != state->workload ||
	    (!grant->source_workload && (skb->mark & DELIVERY_MASK) != DELIVERY_MARK))
		return refuse_packet(t, IPPROTO_TCP, state, grant, REASON_PEER_NOT_ATTESTED);
	return 1;
}

static __always_inline int refuse_unknown(const struct tuple *t, __u8 protocol,
					  struct socket_state *state)
{
	struct grant none = {};

	return refuse_packet(t, protocol, state, &none, REASON_PROTOCOL_NOT_CARRIED);
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
	struct socket_state buffer = {}, *state;
	struct tuple t = {};
	__u32 headers = 0;
	__u8 protocol = 0;

	socket = socket ? bpf_sk_fullsock(socket) : 0;
	if (!socket)
		return 0;
	state = seen_state(socket, &buffer);
	if (!state) {
		state = late_state(socket);
		if (!state) {
			count(REASON_NO_IDENTITY);
			return 0;
		}
	}
	OPAQUE(state);
	if (state->socket_class == CLASS_AGENT)
		return socket->state != BPF_TCP_LISTEN || agent_listens(skb, socket);
	if ((state->flags & SOCKET_ADMITTED) && socket->state != BPF_TCP_LISTEN &&
	    socket->protocol == IPPROTO_TCP)
		return 1;
	if (!packet_tuple(skb, &t, &protocol, &headers))
		return refuse_unknown(&t, protocol, state);
	/* Such packets cannot come from outside: the kernel drops them as martians. */
	if (address_is_loopback(&t.source) || address_is_loopback(&t.destination) ||
	    address_equal(&t.source, &t.destination))
		return 1;
	if (protocol == IPPROTO_UDP)
		return datagram_in(skb, socket, &t, state, headers);
	return segment_in(skb, socket, &t, state, headers);
}
