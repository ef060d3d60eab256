//! An authority that listens on loopback, the accounts that it believes to run, and raw clients.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use control::{CaConfig, CertificateAuthority, Placements};
use hyper_util::rt::TokioIo;
use identity::{
    IdentitySource, Keeper, KeeperConfig, SpiffeId, Svid,
    ca_api::{
        IMPERSONATED_IDENTITY, SERVER_NAME,
        istio::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_client::IstioCertificateServiceClient,
        },
    },
    certificate::{from_pem, verify},
};
use linux::netns::Netns;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{PrivatePkcs8KeyDer, ServerName},
    version::TLS13,
};
use tempfile::TempDir;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint, Uri},
};

pub(crate) const DOMAIN: &str = "cluster.local";
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// `NODE NAMESPACE/ACCOUNT`, as the test says.
#[derive(Default)]
pub(crate) struct Accounts(Mutex<BTreeSet<(String, String)>>);

impl Accounts {
    pub(crate) fn place(&self, node: &str, account: &str) {
        let entry = (node.to_owned(), account.to_owned());
        self.0.lock().unwrap().insert(entry);
    }
}

impl Placements for Accounts {
    fn runs(&self, node: &str, namespace: &str, account: &str) -> bool {
        let entry = (node.to_owned(), format!("{namespace}/{account}"));
        self.0.lock().unwrap().contains(&entry)
    }

    fn accounts(&self, node: &str, most: usize) -> Vec<String> {
        let all = self.0.lock().unwrap();
        let there = all.iter().filter(|(on, _)| on == node);
        there
            .map(|(_, account)| account.clone())
            .take(most)
            .collect()
    }
}

/// An authority, and a folder for everything.
pub(crate) struct World {
    pub(crate) folder: TempDir,
    pub(crate) accounts: Arc<Accounts>,
    pub(crate) config: CaConfig,
    pub(crate) address: SocketAddr,
    pub(crate) ca: Option<CertificateAuthority>,
}

impl World {
    /// `n1` runs `shop/a`, `n2` runs `shop/b`.
    pub(crate) fn start(change: impl FnOnce(&mut CaConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = CaConfig::new(folder.path().join("ca"));
        change(&mut config);
        let accounts = Arc::new(Accounts::default());
        accounts.place("n1", "shop/a");
        accounts.place("n2", "shop/b");
        let mut world = Self {
            folder,
            accounts,
            config,
            address: "127.0.0.1:0".parse().unwrap(),
            ca: None,
        };
        world.listen();
        world
    }

    /// Starts the authority (again), on the address that it had.
    pub(crate) fn listen(&mut self) {
        let accounts: Arc<dyn Placements> = Arc::clone(&self.accounts) as _;
        let ca = CertificateAuthority::open(&self.config, DOMAIN, accounts).unwrap();
        let netns = Netns::current().unwrap();
        self.address = ca.listen_on(&netns, &[self.address]).unwrap()[0];
        self.ca = Some(ca);
    }

    pub(crate) async fn stop(&mut self) {
        self.ca.take().unwrap().shutdown().await;
    }

    pub(crate) fn ca(&self) -> &CertificateAuthority {
        self.ca.as_ref().unwrap()
    }

    pub(crate) fn roots(&self) -> String {
        self.ca().authority().roots_pem()
    }

    pub(crate) fn token(&self, node: &str) -> String {
        self.ca().tokens().issue(node).unwrap()
    }

    /// A keeper that may join with these tokens, one after the other.
    pub(crate) fn keeper(&self, node: &str, tokens: Vec<String>) -> Keeper {
        Keeper::start(self.keeper_config(node, tokens)).unwrap()
    }

    pub(crate) fn keeper_config(&self, node: &str, tokens: Vec<String>) -> KeeperConfig {
        let tokens = Arc::new(Mutex::new(tokens.into_iter()));
        KeeperConfig {
            trust_domain: DOMAIN.into(),
            node: node.into(),
            control: self.address,
            netns: None,
            roots: self.roots(),
            state_dir: self.state_dir(node),
            join_token: Arc::new(move || {
                let token = tokens.lock().unwrap().next();
                Box::pin(async move { token.ok_or_else(|| "no token is left".to_owned()) })
            }),
            lifetime: None,
        }
    }

    pub(crate) fn state_dir(&self, node: &str) -> std::path::PathBuf {
        self.folder.path().join(node)
    }

    /// Joins as a node by hand, for raw calls.
    pub(crate) async fn join(&self, node: &str) -> Svid {
        let key = KeyPair::generate().unwrap();
        let request = with_token(asking(&csr(&key), None), &self.token(node));
        let chain = self.connect(None).await.create_certificate(request).await;
        svid(&chain.unwrap().into_inner(), &key)
    }

    pub(crate) async fn connect(
        &self,
        svid: Option<&Svid>,
    ) -> IstioCertificateServiceClient<Channel> {
        IstioCertificateServiceClient::new(channel(self.address, &self.roots(), svid).await)
    }

    /// What a node is told that asks with its certificate.
    pub(crate) async fn ask(
        &self,
        svid: Option<&Svid>,
        csr: &str,
        identity: Option<&str>,
    ) -> Result<IstioCertificateResponse, Status> {
        let mut client = self.connect(svid).await;
        let answer = client.create_certificate(asking(csr, identity)).await;
        answer.map(tonic::Response::into_inner)
    }
}

pub(crate) async fn channel(address: SocketAddr, roots: &str, svid: Option<&Svid>) -> Channel {
    let mut store = RootCertStore::empty();
    for root in from_pem(roots).unwrap() {
        store.add(root).unwrap();
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(store);
    let mut config = match svid {
        Some(svid) => builder
            .with_client_auth_cert(svid.chain.clone(), svid.key.clone_key().into())
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let dial = tower::service_fn(move |_: Uri| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from(SERVER_NAME).unwrap();
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    });
    Endpoint::from_shared(format!("http://{SERVER_NAME}"))
        .unwrap()
        .connect_with_connector(dial)
        .await
        .unwrap()
}

pub(crate) fn csr(key: &KeyPair) -> String {
    let params = CertificateParams::default();
    params.serialize_request(key).unwrap().pem().unwrap()
}

pub(crate) fn new_csr() -> String {
    csr(&KeyPair::generate().unwrap())
}

pub(crate) fn asking(csr: &str, identity: Option<&str>) -> Request<IstioCertificateRequest> {
    let value = |text: &str| prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(text.into())),
    };
    Request::new(IstioCertificateRequest {
        csr: csr.into(),
        validity_duration: 0,
        metadata: identity.map(|identity| prost_types::Struct {
            fields: [(IMPERSONATED_IDENTITY.into(), value(identity))].into(),
        }),
    })
}

pub(crate) fn with_token<T>(mut request: Request<T>, token: &str) -> Request<T> {
    let value = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

pub(crate) fn svid(answer: &IstioCertificateResponse, key: &KeyPair) -> Svid {
    let (roots, chain) = answer.cert_chain.split_last().unwrap();
    let chain = from_pem(&chain.concat()).unwrap();
    verify(&chain, &from_pem(roots).unwrap(), SystemTime::now()).unwrap();
    Svid::new(chain, PrivatePkcs8KeyDer::from(key.serialize_der())).unwrap()
}

pub(crate) fn account(name: &str) -> SpiffeId {
    SpiffeId::of_account(DOMAIN, "shop", name).unwrap()
}

/// Waits until the identity has a certificate that fulfils a condition.
pub(crate) async fn until(
    keeper: &Keeper,
    id: &SpiffeId,
    what: impl Fn(&Svid) -> bool,
) -> Arc<Svid> {
    let mut watch = if id.node().is_some() {
        keeper.node_svid()
    } else {
        keeper.svid(id)
    };
    let found = timeout(
        DEADLINE,
        watch.wait_for(|svid| svid.as_deref().is_some_and(&what)),
    );
    match found.await {
        Ok(found) => found.unwrap().clone().unwrap(),
        Err(_) => panic!("no such certificate: {:#?}", keeper.status()),
    }
}

/// Looks again and again until a condition holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let looked = timeout(DEADLINE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(looked.await.is_ok(), "in time: {what}");
}

pub(crate) fn files(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}
