/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * What a refused program sees: the errno of its connect(), sendto() or socket().
 */
#pragma once

#include "maps.h"

/* Set by the loader: bpf_set_retval exists (Linux 5.18). Without it a refusal is always EPERM. */
const volatile __u32 has_set_retval = 1;

#define EACCES 13
#define EPROTONOSUPPORT 93
#define ENETUNREACH 101
#define ENOBUFS 105
#define ECONNREFUSED 111

static __always_inline int refuse_with(int error)
{
	if (has_set_retval)
		bpf_set_retval(-error);
	return 0;
}

static __always_inline int error_of(__u16 reason)
{
	switch (reason) {
	case REASON_NO_EGRESS:
		return ENETUNREACH;
	case REASON_NO_IDENTITY:
	case REASON_NO_CAPTURE_TARGET:
	case REASON_STATE_FULL:
		return EACCES;
	case REASON_PEERS_FULL:
		return ENOBUFS;
	default:
		return ECONNREFUSED;
	}
}
