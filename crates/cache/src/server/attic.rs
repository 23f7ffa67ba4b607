//! The server side of Attic's protocol: cache-config, get-missing-paths, upload-path. Responds as
//! Attic does, but rejects invalid metadata that Attic would accept.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::json;

use crate::server::body::RequestBody;
use crate::server::connection::BytesMoved;
use crate::server::error::ErrorResponse;
use crate::server::state::{Cache, Cost, ServerState};
use crate::server::store::Store;
use crate::server::token::Scope;
use crate::server::upload::{check_content_address, check_length, receive_announced};
use crate::server::upload_info::UploadInfo;
use flywheel_nix::store_path::{PathHash, STORE_DIR};

/// Attic's limit for a preamble, in bytes.
const PREAMBLE_LIMIT: usize = 1024 * 1024;
/// Maximum size of metadata in a header; larger metadata belongs in a preamble, since proxies limit
/// headers much earlier.
const HEADER_LIMIT: usize = 64 * 1024;
/// Attic's limit for the body of get-missing-paths, some 59,900 hashes.
const MISSING_LIMIT: usize = 2 * 1024 * 1024;

/// Up to this many hashes are looked up on the runtime's own threads, since that is quick.
const INLINE_HASHES: usize = 64;

/// Bytes of compressed NARs to hash before a question is answered, of those that this server has not checked yet: well
/// under a second if they are in memory. The rest is claimed by its size, and checked in the background.
const CHECK_BUDGET: u64 = 256 * 1024 * 1024;

const NAR_INFO: &str = "x-attic-nar-info";
const PREAMBLE_SIZE: &str = "x-attic-nar-info-preamble-size";

/// Returns what a client needs to know about a cache.
///
/// # Errors
/// 401 or 404.
pub(crate) async fn cache_config(
    State(shared): State<Arc<ServerState>>,
    Path(cache): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ErrorResponse> {
    let cache = shared.authorise(&headers, &cache, Scope::Read)?;
    Ok(Json(config(&shared, cache, &headers)).into_response())
}

fn config(shared: &ServerState, cache: &Cache, headers: &HeaderMap) -> serde_json::Value {
    let options = &shared.options;
    let mut config = json!({
        "public_key": cache.key.public().to_string(),
        "is_public": options.public,
        "store_dir": STORE_DIR,
        "priority": options.priority,
        "upstream_cache_key_names": options.upstream_keys,
        "retention_period": options.limits.max_age.map_or(json!("Global"), |age| json!({"Period": age.as_secs()})),
    });
    // The URLs as the client reached this server, possibly through a proxy. A malformed `Host`
    // header gets none, as it would be echoed.
    if let Some(base) = base_url(headers) {
        config["substituter_endpoint"] = json!(format!("{base}{}", cache.name));
        config["api_endpoint"] = json!(base);
    }
    config
}

fn base_url(headers: &HeaderMap) -> Option<String> {
    let host = headers.get(header::HOST)?.to_str().ok()?;
    // Brackets and colons occur in IPv6 addresses and ports.
    let plain = |c: u8| c.is_ascii_alphanumeric() || b".-_:[]".contains(&c);
    // A proxy that terminates TLS reports the scheme in this header.
    let secure = headers
        .get("x-forwarded-proto")
        .is_some_and(|proto| proto == "https");
    let scheme = if secure { "https" } else { "http" };
    (!host.is_empty() && host.bytes().all(plain)).then(|| format!("{scheme}://{host}/"))
}

/// Answers `attic cache create`, `configure` and `destroy`, which are no business of clients here.
///
/// # Errors
/// Always: 400 for the creation of a cache that is there, else 405.
pub(crate) async fn refuse_change(
    State(shared): State<Arc<ServerState>>,
    Path(cache): Path<String>,
    request: Request,
) -> ErrorResponse {
    let shown = flywheel_core::text::one_line(&cache, 60);
    let may_know = shared
        .authorise(request.headers(), &cache, Scope::Read)
        .is_ok();
    if may_know && request.method() == axum::http::Method::POST {
        return ErrorResponse::cache_exists(&shown);
    }
    ErrorResponse::caches_are_fixed()
}

#[derive(Deserialize)]
struct MissingPathsRequest {
    cache: String,
    store_path_hashes: Vec<PathHash>,
}

/// Returns those of the given paths that the cache cannot serve.
///
/// # Errors
/// 401, 403 or 404; 413, 415 or 422 for an invalid body.
pub(crate) async fn get_missing_paths(
    State(shared): State<Arc<ServerState>>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let (parts, body) = request.into_parts();
    // The cache is named in the body, so this is all that can be checked before reading it.
    shared.authorise_some_write(&parts.headers)?;
    let json = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    if !json.is_some_and(|text| text.to_ascii_lowercase().starts_with("application/json")) {
        return Err(ErrorResponse::unsupported_media_type(
            "the body must be `Content-Type: application/json`",
        ));
    }
    let memory = shared.metadata_slot(&parts.headers, MISSING_LIMIT).await?;
    let body = RequestBody::new(body).read_all(MISSING_LIMIT).await?;
    let request: MissingPathsRequest = serde_json::from_slice(&body).map_err(|error| {
        let text = flywheel_core::text::one_line(&error.to_string(), 200);
        // As in axum, which Attic uses: 422 for the wrong structure, 400 for a syntax error.
        if error.is_data() {
            ErrorResponse::unprocessable(text)
        } else {
            ErrorResponse::bad_request(text)
        }
    })?;
    let cache = shared
        .authorise(&parts.headers, &request.cache, Scope::Write)?
        .name
        .clone();
    drop((body, memory));
    let mut hashes = request.store_path_hashes;
    hashes.sort();
    // Each hash costs a look at the disk.
    hashes.dedup();
    let few = hashes.len() <= INLINE_HASHES;
    let look = move |store: &Store| store.missing(&cache, hashes);
    let (mut missing, unchecked) = if few {
        shared.run_inline(look).await?
    } else {
        shared.run_blocking(look).await?
    };
    if !unchecked.is_empty() {
        let (damaged, left) = shared
            .run_blocking(move |store| store.confirm_within(unchecked, CHECK_BUDGET))
            .await?;
        missing.extend(damaged);
        shared.unchecked.add(left);
    }
    Ok(Json(json!({ "missing_paths": missing })).into_response())
}

/// Accepts a path: metadata in a header or at the start of the body, then the NAR.
///
/// # Errors
/// 401, 403 or 404 before any of the NAR is read; 400 for invalid metadata or a wrong NAR.
pub(crate) async fn upload_path(
    State(shared): State<Arc<ServerState>>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let (parts, body) = request.into_parts();
    let mut body = RequestBody::new(body);
    let (info, preamble) = read_info(&shared, &parts.headers, &mut body).await?;
    // The cache is named in the metadata, so only now can the token be checked against it.
    let cache = shared.authorise(&parts.headers, &info.cache, Scope::Write)?;
    check_length(&parts.headers, info.path.nar_size.checked_add(preamble))?;
    // Without proof, the metadata is enough and the body stays unread.
    if !shared.options.require_proof && commit_known_nar(&shared, cache, &info).await? {
        let answer = json!({"kind": "Deduplicated", "file_size": null, "frac_deduplicated": 1.0});
        return Ok(Json(answer).into_response());
    }
    // Held until the response is ready, which bounds the memory of all uploads together.
    let _slot = shared.upload_slot(Cost::new(info.path.nar_size)).await?;
    let stored = receive_announced(&shared, &mut body, &cache.name, info.path).await?;
    let kind = if stored.known {
        "Deduplicated"
    } else {
        "Uploaded"
    };
    let answer =
        json!({"kind": kind, "file_size": stored.nar.file_size, "frac_deduplicated": null});
    let mut response = Json(answer).into_response();
    response
        .extensions_mut()
        .insert(BytesMoved(stored.received));
    Ok(response)
}

/// Adds a path whose NAR is stored already, without reading the body. Returns `false` if the NAR is
/// not stored.
async fn commit_known_nar(
    shared: &ServerState,
    cache: &Cache,
    info: &UploadInfo,
) -> Result<bool, ErrorResponse> {
    let hash = info.path.nar_hash;
    let Some(known) = shared
        .run_blocking(move |store| store.known_nar(&hash))
        .await?
    else {
        return Ok(false);
    };
    let (name, path) = (cache.name.clone(), info.path.clone());
    shared
        .run_blocking(move |store| {
            check_content_address(store, &path)?;
            store
                .commit(&name, &path, known)
                .map_err(ErrorResponse::from)
        })
        .await
}

/// Reads the metadata and returns it with its size in the body in bytes.
///
/// If the metadata is in the header, the body stays unread, so an error reaches a client that waits
/// for `100 Continue`.
async fn read_info(
    shared: &ServerState,
    headers: &HeaderMap,
    body: &mut RequestBody,
) -> Result<(UploadInfo, u64), ErrorResponse> {
    let refuse = |error: crate::server::upload_info::InfoError| {
        ErrorResponse::bad_request(error.to_string())
    };
    if let Some(json) = headers.get(NAR_INFO) {
        if json.len() > HEADER_LIMIT {
            return Err(ErrorResponse::bad_request(format!(
                "`{NAR_INFO}` is over {HEADER_LIMIT} bytes: send a preamble"
            )));
        }
        let info = UploadInfo::parse(json.as_bytes());
        if info.is_err() {
            // Check the token first, so that strangers get no details about the metadata.
            shared.authorise_some_write(headers)?;
        }
        return Ok((info.map_err(refuse)?, 0));
    }
    // The cache is named in the body, so this is all that can be checked before reading it.
    shared.authorise_some_write(headers)?;
    let size = headers.get(PREAMBLE_SIZE).ok_or_else(|| {
        ErrorResponse::bad_request(format!(
            "neither `{NAR_INFO}` nor `{PREAMBLE_SIZE}` is there"
        ))
    })?;
    let size: Option<usize> = size.to_str().ok().and_then(|text| text.parse().ok());
    let size = size
        .filter(|size| (1..=PREAMBLE_LIMIT).contains(size))
        .ok_or_else(|| {
            ErrorResponse::bad_request(format!(
                "`{PREAMBLE_SIZE}` is not a number from 1 to {PREAMBLE_LIMIT}"
            ))
        })?;
    let _memory = shared.metadata_slot(headers, size).await?;
    let json = body.take(size).await?;
    Ok((UploadInfo::parse(&json).map_err(refuse)?, size as u64))
}
