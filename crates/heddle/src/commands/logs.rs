//! `heddle logs WORKLOAD`.

use std::{io::Write as _, process::ExitCode};

use http_body_util::BodyExt as _;
use hyper::Method;

use crate::{
    cli::LogsArgs,
    client::{self, escape},
    mesh_api,
};

pub(super) async fn run(args: LogsArgs) -> anyhow::Result<ExitCode> {
    let socket = mesh_api::socket(&args.common.mesh)?;
    let path = format!(
        "/v1/logs?workload={}&follow={}",
        escape(&args.workload),
        args.follow
    );
    let mut body = client::request(&socket, Method::GET, &path).await?;
    let mut stdout = std::io::stdout().lock();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        match stdout.write_all(&data).and_then(|()| stdout.flush()) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(ExitCode::SUCCESS)
}
