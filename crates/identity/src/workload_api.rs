//! The SPIFFE Workload API, X.509 and JWT profiles (spiffe.io, SPIFFE_Workload_API): a workload gets its own identity and no other.
//!
//! Who calls was attested when the connection was accepted ([`crate::socket`]).

use std::{collections::HashMap, sync::Arc};

use prost_types::{ListValue, Struct, Value, value::Kind};
use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{
    IdentitySource, JwtError, TrustBundle,
    attest::Caller,
    jwt_validation,
    socket::{Hooks, Refusal, caller},
    watch::{Answers, PATIENCE, Seen, View, stopping},
};

/// The generated messages, client and server.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::use_self
)] // Generated code.
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/_.rs"));
}

use proto::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse,
    ValidateJwtsvidRequest, ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse,
    X509svid, X509svidRequest, X509svidResponse, spiffe_workload_api_server::SpiffeWorkloadApi,
};

/// Metadata that every call must carry, so that no other kind of client is tricked into one (SPIFFE_Workload_API, section 3).
pub const SECURITY_HEADER: &str = "workload.spiffe.io";
/// Most audiences of one token, and the longest of them in bytes.
const MAX_AUDIENCES: usize = 16;
const MAX_AUDIENCE_BYTES: usize = 1024;

pub(crate) struct WorkloadApi<S> {
    pub(crate) source: Arc<S>,
    pub(crate) hooks: Hooks,
    pub(crate) stop: CancellationToken,
}

#[tonic::async_trait]
impl<S: IdentitySource> SpiffeWorkloadApi for WorkloadApi<S> {
    type FetchX509SVIDStream = Answers<X509svidResponse>;
    type FetchX509BundlesStream = Answers<X509BundlesResponse>;
    type FetchJWTBundlesStream = Answers<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let view = self.view(&request)?;
        Ok(Response::new(view.stream(x509_svids)))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let view = self.view(&request)?;
        Ok(Response::new(view.stream(x509_bundles)))
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let caller = self.admit(&request)?;
        let request = request.into_inner();
        check_audiences(&request.audience)?;
        if !request.spiffe_id.is_empty() && request.spiffe_id != caller.id.as_str() {
            return Err(self.hooks.not_the_callers(&caller, &request.spiffe_id));
        }
        let token = tokio::select! {
            token = self.source.jwt(&caller.id, &request.audience) => token,
            () = tokio::time::sleep(PATIENCE) => {
                Err(JwtError::Unavailable(format!("no answer within {} s", PATIENCE.as_secs())))
            }
            () = self.stop.cancelled() => return Err(stopping()),
        };
        let token = token.map_err(|error| match error {
            JwtError::Refused(_) => Status::permission_denied(error.to_string()),
            JwtError::Unavailable(_) => Status::unavailable(error.to_string()),
        })?;
        Ok(Response::new(JwtsvidResponse {
            svids: vec![Jwtsvid {
                spiffe_id: caller.id.to_string(),
                svid: token,
                hint: String::new(),
            }],
        }))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        let view = self.view(&request)?;
        Ok(Response::new(view.stream(jwt_bundles)))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        check_audiences(std::slice::from_ref(&request.audience))?;
        let bundle = self.source.bundle().borrow().clone();
        let valid = jwt_validation::validate(&request.svid, &request.audience, &bundle)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(ValidateJwtsvidResponse {
            spiffe_id: valid.id.to_string(),
            claims: Some(structure(valid.claims)),
        }))
    }
}

impl<S: IdentitySource> WorkloadApi<S> {
    fn admit<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let header = request.metadata().get(SECURITY_HEADER);
        if header.is_none_or(|value| value.as_bytes() != b"true") {
            self.hooks.refused(Refusal::NoSecurityHeader);
            return Err(Status::invalid_argument(format!(
                "the metadata `{SECURITY_HEADER}: true` is missing"
            )));
        }
        caller(request)
    }

    fn view<T>(&self, request: &Request<T>) -> Result<View, Status> {
        let caller = self.admit(request)?;
        Ok(View::new(
            self.source.as_ref(),
            &caller.id,
            self.stop.clone(),
        ))
    }
}

fn x509_svids(seen: &Seen) -> Option<X509svidResponse> {
    let svid = seen.svid.as_ref()?;
    let bundle = roots(&seen.bundle)?;
    Some(X509svidResponse {
        svids: vec![X509svid {
            spiffe_id: svid.id.to_string(),
            x509_svid: concatenated(&svid.chain),
            x509_svid_key: svid.key.secret_pkcs8_der().to_vec(),
            bundle,
            hint: String::new(),
        }],
        ..X509svidResponse::default()
    })
}

fn x509_bundles(seen: &Seen) -> Option<X509BundlesResponse> {
    Some(X509BundlesResponse {
        bundles: HashMap::from([(domain(&seen.bundle), roots(&seen.bundle)?)]),
        ..X509BundlesResponse::default()
    })
}

fn jwt_bundles(seen: &Seen) -> Option<JwtBundlesResponse> {
    let keys = &seen.bundle.jwt_keys;
    (!keys.is_empty()).then(|| JwtBundlesResponse {
        bundles: HashMap::from([(domain(&seen.bundle), keys.clone().into_bytes())]),
    })
}

fn roots(bundle: &TrustBundle) -> Option<Vec<u8>> {
    (!bundle.roots.is_empty()).then(|| concatenated(&bundle.roots))
}

fn concatenated(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    certificates
        .iter()
        .flat_map(|certificate| certificate.iter().copied())
        .collect()
}

/// A trust domain's id, the key of bundles.
fn domain(bundle: &TrustBundle) -> String {
    format!("spiffe://{}", bundle.trust_domain)
}

fn check_audiences(audiences: &[String]) -> Result<(), Status> {
    if audiences.is_empty() || audiences.iter().any(|audience| audience.trim().is_empty()) {
        return Err(Status::invalid_argument("an audience is missing or empty"));
    }
    if audiences.len() > MAX_AUDIENCES
        || audiences
            .iter()
            .any(|audience| audience.len() > MAX_AUDIENCE_BYTES)
    {
        return Err(Status::invalid_argument(format!(
            "at most {MAX_AUDIENCES} audiences of {MAX_AUDIENCE_BYTES} bytes each"
        )));
    }
    Ok(())
}

fn structure(claims: serde_json::Map<String, serde_json::Value>) -> Struct {
    Struct {
        fields: claims
            .into_iter()
            .map(|(name, value)| (name, protobuf_value(value)))
            .collect(),
    }
}

/// No recursion deeper than the JSON parser's own bound.
fn protobuf_value(value: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(value),
        Json::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        Json::String(value) => Kind::StringValue(value),
        Json::Array(values) => Kind::ListValue(ListValue {
            values: values.into_iter().map(protobuf_value).collect(),
        }),
        Json::Object(values) => Kind::StructValue(structure(values)),
    };
    Value { kind: Some(kind) }
}
