//! What is a SPIFFE id and what is none.
#![allow(clippy::unwrap_used)] // A test ends at the first thing that fails.

use proptest::prelude::*;

use super::*;

#[test]
fn accounts_and_nodes_are_told_apart() {
    let account = SpiffeId::of_account("cluster.local", "shop", "cart").unwrap();
    assert_eq!(account.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(account.principal(), "cluster.local/ns/shop/sa/cart");
    assert_eq!(account.trust_domain(), "cluster.local");
    assert_eq!(account.account(), Some(("shop", "cart")));
    assert_eq!(account.node(), None);

    let node = SpiffeId::of_node("cluster.local", "node-1").unwrap();
    assert_eq!(node.node(), Some("node-1"));
    assert_eq!(node.account(), None);
}

#[test]
fn what_the_standard_forbids_is_refused() {
    for text in [
        "",
        "http://cluster.local/x",
        "spiffe://",
        "spiffe:///ns/a/sa/b",
        "spiffe://Cluster.local/ns/a",
        "spiffe://user@cluster.local/ns",
        "spiffe://cluster.local:80/ns",
        "spiffe://cluster.local/",
        "spiffe://cluster.local//ns",
        "spiffe://cluster.local/ns/../sa",
        "spiffe://cluster.local/ns/a%20b",
        "spiffe://cluster.local/ns/a?x",
    ] {
        assert!(text.parse::<SpiffeId>().is_err(), "{text}");
    }
    assert!(SpiffeId::of_account("td", "a/b", "").is_err());
    // More parts than an account has.
    let deep: SpiffeId = "spiffe://td/ns/a/sa/b/c".parse().unwrap();
    assert_eq!(deep.account(), None);
}

proptest! {
    #[test]
    fn any_text_is_survived_and_what_is_read_is_written_again(text in ".{0,80}") {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn any_bytes_instead_of_a_certificate_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(SpiffeId::of_certificate(&bytes).is_err());
    }
}
