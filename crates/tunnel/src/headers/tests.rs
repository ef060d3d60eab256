//! What is an authority and what is none; that headers are read as they were written.

use proptest::prelude::*;

use super::*;

#[test]
fn authorities() {
    let address = |text: &str| Authority::Address(text.parse().unwrap());
    assert_eq!("10.0.0.1:80".parse(), Ok(address("10.0.0.1:80")));
    assert_eq!("[fd00::1]:80".parse(), Ok(address("[fd00::1]:80")));
    let host = Authority::Host {
        name: "cart.shop".into(),
        port: 8080,
    };
    assert_eq!("Cart.shop:8080".parse(), Ok(host));
    for text in [
        "",
        ":80",
        "10.0.0.1",
        "10.0.0.1:",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1:+80",
        "10.0.0:80",
        "10.0.0.256:80",
        "fd00::1:80",
        "[fd00::1]",
        "[fd00::1%2]:80",
        "[10.0.0.1]:80",
        "a..b:80",
        "user@host:80",
        "host/path:80",
        "höst:80",
    ] {
        assert_eq!(text.parse::<Authority>(), Err(AuthorityError), "{text}");
    }
}

#[test]
fn forwarded_as_others_write_it() {
    let address = Some("10.1.0.2:41234".parse().unwrap());
    for (text, expected) in [
        ("for=\"10.1.0.2:41234\"", (address, None)),
        (
            "for=\"10.1.0.2:41234\";host=cart.shop",
            (address, Some("cart.shop".to_owned())),
        ),
        (
            "By=_a ; FOR=\"10.1.0.2:41234\" ;proto=http;host=\"a;b\"",
            (address, Some("a;b".to_owned())),
        ),
        ("for=\"10.1.0.2:41234\", for=10.9.9.9", (address, None)),
        ("for=unknown", (None, None)),
        ("for=\"10.1.0.2:41234", (None, None)),
        ("for", (None, None)),
        ("", (None, None)),
    ] {
        assert_eq!(parse_forwarded(text), expected, "{text}");
    }
}

#[test]
fn a_value_that_no_header_can_have_is_an_error() {
    let headers = ConnectHeaders {
        baggage: Some("a\r\nb".to_owned()),
        ..ConnectHeaders::default()
    };
    let authority = "10.0.0.1:80".parse().unwrap();
    assert!(matches!(
        headers.request(&authority),
        Err(ConnectError::Header(_))
    ));
}

proptest! {
    #[test]
    fn any_text_is_survived(text in ".{0,120}") {
        let _ = parse_forwarded(&text);
        if let Ok(authority) = text.parse::<Authority>() {
            prop_assert_eq!(authority.to_string().parse(), Ok(authority));
        }
    }

    #[test]
    fn any_header_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut headers = HeaderMap::new();
        if let Ok(value) = HeaderValue::from_bytes(&bytes) {
            for name in [FORWARDED, BAGGAGE, TRACEPARENT] {
                headers.insert(name, value.clone());
            }
        }
        let _ = ConnectHeaders::read(&headers);
    }

    #[test]
    fn what_is_written_is_read(
        v6 in any::<bool>(), bits in any::<u128>(), port in 1..=u16::MAX,
        host in proptest::option::of("[ -~]{1,40}"),
        baggage in proptest::option::of("[!-~]{0,80}"), traceparent in proptest::option::of("[0-9a-f-]{55}"),
    ) {
        let ip: IpAddr = if v6 { Ipv6Addr::from(bits).into() } else { std::net::Ipv4Addr::from(bits as u32).into() };
        let address = SocketAddr::from((ip, port));
        let headers = ConnectHeaders { forwarded_for: Some(address), forwarded_host: host, baggage, traceparent };
        let authority = Authority::Address(address);
        let request = headers.request(&authority).unwrap();
        prop_assert_eq!(ConnectHeaders::read(request.headers()), headers);
        let written = request.uri().authority().unwrap().as_str().parse();
        prop_assert_eq!(written, Ok(authority));
    }
}
