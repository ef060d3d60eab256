/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The decision: where a connection goes, and whether it may. Every miss is a refusal with a reason.
 */
#pragma once

#include <linux/in.h>

#include "address.h"
#include "maps.h"

struct decision {
	struct address destination;
	__u16 port;
	__u16 reason;
	__u8 action; /* enum action; ACTION_DENY leaves the rest unset */
	__u8 local;  /* stays inside the workload */
	__u8 reply;  /* a datagram back to a client that may ask */
	__u8 captured; /* led to the agent, which is told of it */
};

/* What asks for a decision, and of what. */
enum call {
	CALL_CONNECT,
	CALL_SENDMSG,
};

struct question {
	enum call call;
	__u8 protocol;
	__u16 own_port; /* of a datagram socket that is bound already, else 0 */
	__u32 draw;     /* which endpoint: random, but the same for one socket's datagrams */
};

/* Ports in a workload that are the agent's; see struct capture_key. */
static __always_inline int capture_target(__u32 workload, __u32 kind, __u16 *port)
{
	struct capture_key key = { .workload = workload, .kind = kind };
	__u32 *target = bpf_map_lookup_elem(&capture, &key);

	if (!target)
		return 0;
	*port = *target;
	return 1;
}

static __always_inline struct endpoint_entry *sticky_endpoint(const struct affinity_key *key,
							      const struct service_entry *service)
{
	struct affinity_entry *sticky = bpf_map_lookup_elem(&affinity, key);
	struct endpoint_entry *endpoint;
	__u64 now;

	if (!sticky)
		return 0;
	now = bpf_ktime_get_ns();
	if (now - sticky->last_ns > (__u64)service->affinity_seconds * 1000000000ULL)
		return 0;
	/* Endpoint ids are never used twice: an entry that is there is still this service's. */
	endpoint = bpf_map_lookup_elem(&endpoints, &sticky->endpoint);
	if (!endpoint || endpoint->service != service->service)
		return 0;
	sticky->last_ns = now;
	return endpoint;
}

static __always_inline struct endpoint_entry *
pick_endpoint(__u32 workload, const struct question *question, const struct service_entry *service)
{
	struct affinity_key sticky_key = { .workload = workload, .service = service->service };
	struct slot_key key = { .service = service->service, .generation = service->generation };
	struct affinity_entry sticky = {};
	struct endpoint_entry *endpoint;
	struct slot_entry *slot;
	__u32 chosen;
	__u64 draw;

	if (service->affinity_seconds) {
		endpoint = sticky_endpoint(&sticky_key, service);
		if (endpoint)
			return endpoint;
	}
	draw = (__u64)question->draw * service->slots;
	key.slot = draw >> 32;
	slot = bpf_map_lookup_elem(&slots, &key);
	if (!slot)
		return 0;
	/* What is left of the number below the slot is as random as the whole. */
	chosen = (__u32)draw <= slot->threshold ? slot->endpoint : slot->alias;
	endpoint = bpf_map_lookup_elem(&endpoints, &chosen);
	if (endpoint && service->affinity_seconds) {
		sticky.endpoint = chosen;
		sticky.last_ns = bpf_ktime_get_ns();
		bpf_map_update_elem(&affinity, &sticky_key, &sticky, BPF_ANY);
	}
	return endpoint;
}

static __always_inline struct verdict_entry *find_verdict(__u32 source, __u32 policy_set, __u16 port,
							  __u8 socket_class)
{
	struct verdict_key key = {
		.source = source,
		.policy_set = policy_set,
		.port = port,
		.socket_class = socket_class,
	};
	struct verdict_entry *verdict = bpf_map_lookup_elem(&verdicts, &key);

	if (verdict)
		return verdict;
	key.port = 0;
	return bpf_map_lookup_elem(&verdicts, &key);
}

/* Replaces a service's address by an endpoint's. Returns a reason to refuse, or REASON_NONE. */
static __always_inline __u16 resolve_service(__u32 workload, const struct question *question,
					     struct decision *d, struct grant *grant)
{
	struct service_key key = { .address = d->destination,
				   .port = d->port,
				   .protocol = question->protocol };
	struct service_entry *service = bpf_map_lookup_elem(&services, &key);
	struct endpoint_entry *endpoint;

	if (!service) {
		key.port = 0;
		key.protocol = 0;
		return bpf_map_lookup_elem(&services, &key) ? REASON_NO_SUCH_PORT : REASON_NONE;
	}
	grant->service = service->service;
	if (!service->slots)
		return REASON_NO_ENDPOINT;
	endpoint = pick_endpoint(workload, question, service);
	if (!endpoint) /* the table was switched under us: once more with the new one */
		service = bpf_map_lookup_elem(&services, &key);
	if (!endpoint && service && service->slots)
		endpoint = pick_endpoint(workload, question, service);
	if (!endpoint)
		return REASON_NO_ENDPOINT;
	d->destination = endpoint->address;
	d->port = endpoint->port;
	return REASON_NONE;
}

/* The agent's ports that connections are led to. Nobody calls them. */
static __always_inline int is_led_to(__u16 port)
{
	return port == PORT_OUTBOUND || port == PORT_INBOUND;
}

/* A connected datagram socket may never send: resolvers connect one only to learn which source address an
 * answer would be reached from. It is led to the workload itself, where nothing listens on port 0. */
static __always_inline void park(struct decision *d, const struct workload_entry *self)
{
	d->destination = address_is_v4(&d->destination) ? self->v4 : self->v6;
	d->port = 0;
	d->action = ACTION_DIRECT;
	d->local = 1;
}

static __always_inline void redirect_to_own(struct decision *d, const struct workload_entry *self,
					    __u32 workload, __u32 kind, __u16 missing,
					    struct grant *grant)
{
	__u16 port;

	if (!capture_target(workload, kind, &port)) {
		d->reason = missing;
		return;
	}
	if (kind == CAPTURE_AGENT) {
		grant->target = d->destination;
		grant->target_port = d->port;
		d->captured = 1;
	}
	d->port = port;
	d->destination = address_is_v4(&d->destination) ? self->v4 : self->v6;
	d->action = kind == CAPTURE_L7 ? ACTION_L7 : ACTION_AGENT;
	d->local = 1;
}

/*
 * Whether the server's node is known to refuse this connection: then the program hears it from connect(), with the policy
 * that says so. Anything but a known refusal is left to that node.
 */
static __always_inline int refused_there(const struct address_entry *target, struct decision *d,
					 struct grant *grant, __u8 socket_class)
{
	struct verdict_entry *verdict;

	if (!target->policy_set)
		return 0;
	verdict = find_verdict(grant->source, target->policy_set, d->port, socket_class);
	if (!verdict || verdict->action != ACTION_DENY)
		return 0;
	grant->policy = verdict->policy;
	d->reason = verdict->reason;
	return 1;
}

/*
 * Whether a workload of this node may ask the server `self` on this port by datagrams: then the server may answer it.
 * Whether the client takes what comes is looked at where it arrives.
 */
static __always_inline int may_answer(const struct workload_entry *self,
				      const struct workload_entry *client, __u16 own_port,
				      __u32 family)
{
	struct verdict_entry *verdict;

	if (!own_port)
		return 0;
	verdict = find_verdict(client->source[family & 1], self->policy_set[family & 1], own_port,
			       CLASS_APP);
	return verdict && verdict->action == ACTION_DIRECT;
}

/* Decides a connection (or datagram) of `state`'s socket to d->destination:d->port. */
static __always_inline void decide(const struct socket_state *state, const struct question *question,
				   struct decision *d, struct grant *grant)
{
	int datagram = question->protocol == IPPROTO_UDP;
	int connects_datagram = datagram && question->call == CALL_CONNECT;
	__u32 workload = state->workload;
	struct workload_entry *self = bpf_map_lookup_elem(&workloads, &workload);
	struct workload_entry *peer;
	struct address_entry *target;
	struct verdict_entry *verdict;
	__u32 peer_id, family;

	d->action = ACTION_DENY;
	d->reason = REASON_NO_IDENTITY;
	if (!self || self->netns != state->netns)
		return;
	family = address_family(&d->destination);
	grant->source_workload = workload;
	grant->source = self->source[family & 1];
	if (address_is_loopback(&d->destination) || address_equal(&d->destination, &self->v4) ||
	    address_equal(&d->destination, &self->v6)) {
		if (!datagram && is_led_to(d->port)) {
			d->reason = REASON_RESERVED_PORT;
			return;
		}
		d->action = ACTION_DIRECT;
		d->reason = REASON_NONE;
		d->local = 1;
		return;
	}
	if (d->port == 53) {
		struct service_key key = { .address = d->destination };

		/* Names are answered in the workload itself, whichever server it believes in,
		 * unless that server is a service or a workload of the mesh. */
		if (!bpf_map_lookup_elem(&services, &key) &&
		    !bpf_map_lookup_elem(&addresses, &d->destination)) {
			redirect_to_own(d, self, workload, CAPTURE_DNS, REASON_NO_CAPTURE_TARGET,
					grant);
			return;
		}
	}
	if (connects_datagram && d->port == 0) {
		park(d, self);
		return;
	}
	d->reason = resolve_service(workload, question, d, grant);
	if (d->reason != REASON_NONE) {
		if (connects_datagram && d->reason == REASON_NO_SUCH_PORT)
			park(d, self);
		return;
	}
	target = bpf_map_lookup_elem(&addresses, &d->destination);
	if (!target) {
		d->reason = grant->service ? REASON_NO_SUCH_ADDRESS : REASON_NO_EGRESS;
		if (connects_datagram && d->reason == REASON_NO_EGRESS)
			park(d, self);
		return;
	}
	peer_id = target->workload;
	grant->destination_workload = peer_id;
	if (!(target->flags & ADDRESS_LOCAL)) {
		if (datagram)
			d->reason = REASON_UDP_NOT_CARRIED;
		else if (!refused_there(target, d, grant, state->socket_class))
			redirect_to_own(d, self, workload, CAPTURE_AGENT, REASON_NO_TUNNEL, grant);
		return;
	}
	if (!datagram && is_led_to(d->port)) {
		d->reason = REASON_RESERVED_PORT;
		return;
	}
	if (peer_id == workload) { /* a service that led back to its caller */
		d->action = ACTION_DIRECT;
		d->local = 1;
		return;
	}
	peer = bpf_map_lookup_elem(&workloads, &peer_id);
	verdict = peer ? find_verdict(grant->source, peer->policy_set[family & 1], d->port,
				      state->socket_class)
		       : 0;
	if (datagram && peer && (!verdict || verdict->action != ACTION_DIRECT) &&
	    may_answer(self, peer, question->own_port, family)) {
		d->action = ACTION_DIRECT;
		d->reason = REASON_NONE;
		d->reply = 1;
		return;
	}
	if (!verdict) {
		d->reason = REASON_NO_VERDICT;
		return;
	}
	grant->policy = verdict->policy;
	d->reason = verdict->reason;
	if (verdict->action == ACTION_DIRECT)
		d->action = ACTION_DIRECT;
	else if (verdict->action == ACTION_DENY)
		return;
	else if (datagram) /* proxies carry no datagrams, so one that must be looked at goes nowhere */
		d->reason = REASON_NO_CAPTURE_TARGET;
	else if (verdict->action == ACTION_L7)
		redirect_to_own(d, self, workload, CAPTURE_L7, REASON_NO_CAPTURE_TARGET, grant);
	else if (verdict->action == ACTION_AGENT)
		redirect_to_own(d, self, workload, CAPTURE_AGENT, REASON_NO_CAPTURE_TARGET, grant);
}
