//! Nix's HTTP binary cache protocol: reading for substituters, and writing for `nix copy --to`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};

use crate::server::body::RequestBody;
use crate::server::connection::BytesMoved;
use crate::server::error::ErrorResponse;
use crate::server::ingest::Format;
use crate::server::records::Upload;
use crate::server::serving;
use crate::server::state::{Cache, Cost, ServerState};
use crate::server::store::{Found, OpenNar};
use crate::server::token::Scope;
use crate::server::upload::{check_length, commit, receive_compressed};
use crate::server::upload_info::check_narinfo;
use crate::server::upload_name::{UploadName, base32};
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::fingerprint;
use flywheel_nix::store_path::{PathHash, STORE_DIR};

/// Maximum size of a narinfo in bytes; real ones are far smaller.
const NARINFO_LIMIT: usize = 1024 * 1024;
const NAR_TYPE: &str = "application/x-nix-nar";
/// A NAR's file up to this size, in bytes, is checked before its narinfo is served for the first time.
const CHECKED_FIRST: u64 = 64 * 1024 * 1024;

/// Serves `nix-cache-info`.
///
/// # Errors
/// 401 or 404.
pub(crate) async fn cache_info(
    State(shared): State<Arc<ServerState>>,
    Path(cache): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ErrorResponse> {
    readable(&shared, &headers, &cache)?;
    let text = format!(
        "WantMassQuery: 1\nStoreDir: {STORE_DIR}\nPriority: {}\n",
        shared.options.priority
    );
    Ok(answer(&shared, "text/x-nix-cache-info", text.into()))
}

/// Refuses Nix's requests where the substituter's address has no cache name.
///
/// # Errors
/// Always: 400 with the whole address, or 404 for any other file.
pub(crate) async fn refuse_without_cache(
    State(shared): State<Arc<ServerState>>,
    Path(file): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ErrorResponse> {
    if file != "nix-cache-info" && !file.ends_with(".narinfo") {
        return Err(ErrorResponse::not_found());
    }
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    // What the client has sent goes back to it, and so is kept to what a host and a port consist of.
    let is_plain = |host: &&str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || ".:-[]".contains(c);
        host.len() <= 256 && host.chars().all(plain)
    };
    let host = host.filter(is_plain).unwrap_or("HOST");
    // A private server does not tell strangers the names of its caches.
    let public = shared.caches.keys().filter(|_| shared.options.public);
    let name = public.map(String::as_str).next().unwrap_or("NAME");
    Err(ErrorResponse::not_a_cache(&format!("http://{host}/{name}")))
}

/// Serves `<hash>.narinfo`, signed with the cache's key on the way out.
///
/// # Errors
/// 401 or 404.
pub(crate) async fn get_narinfo(
    State(shared): State<Arc<ServerState>>,
    Path((cache, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ErrorResponse> {
    let cache = readable(&shared, &headers, &cache)?;
    let hash = path_hash(&file)?;
    let name = cache.name.clone();
    let found = shared
        .run_inline(move |store| store.object(&name, &hash))
        .await?;
    let info = match found {
        Found::Missing => None,
        Found::Checked(info) => Some(info),
        // Nix does not build what a cache has promised and then cannot deliver, so damage shows here if it can. What
        // would take long to read is checked while it is served.
        Found::Unchecked(path) if path.is_suspect() || path.size <= CHECKED_FIRST => {
            shared
                .run_blocking(move |store| store.confirm(path.info))
                .await?
        }
        Found::Unchecked(path) => Some(path.info),
    };
    // Signed on every read: the key may have changed since the upload.
    let info = sign(info.ok_or_else(ErrorResponse::no_object)?, cache);
    Ok(answer(
        &shared,
        "text/x-nix-narinfo",
        info.to_string().into(),
    ))
}

/// Keeps foreign signatures and appends ours, once.
fn sign(mut info: NarInfo, cache: &Cache) -> NarInfo {
    let text = fingerprint(&info.path, &info.nar_hash, info.nar_size, &info.references);
    let ours = format!("{}:", cache.key.public().name());
    info.signatures
        // The uploader may have sent an older signature of ours.
        .retain(|signature| !signature.starts_with(&ours));
    info.signatures.push(cache.key.sign(&text));
    info
}

/// Serves `nar/<NAR hash>.nar.zst`, the name in our narinfos, and each NAR under the names under which `nix copy` has
/// uploaded it: Nix keeps the narinfos that it sends for a month, and reads by them.
///
/// # Errors
/// 401 or 404.
pub(crate) async fn get_nar(
    State(shared): State<Arc<ServerState>>,
    Path((cache, file)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    // Axum answers HEAD with this handler too, and drops the body.
    let cache = readable(&shared, request.headers(), &cache)?;
    let name = cache.name.clone();
    if let Some(hash) = our_name(&file)
        && let Some(nar) = shared
            .run_inline(move |store| store.open_nar(&name, &hash))
            .await?
    {
        return Ok(stored_nar(&shared, nar, hash));
    }
    let Ok(UploadName { format, .. }) = UploadName::parse(&file) else {
        return Err(ErrorResponse::no_object());
    };
    let name = cache.name.clone();
    let (upload, nar) = shared
        .run_blocking(move |store| store.open_upload(&name, &file))
        .await?
        .ok_or_else(ErrorResponse::no_object)?;
    match format {
        Format::Zstd => Ok(stored_nar(&shared, nar, upload.nar_hash)),
        _ if request.method() == axum::http::Method::HEAD => {
            let mut response = answer(&shared, NAR_TYPE, Body::empty());
            describe_repacked(&mut response, format, &upload);
            Ok(response)
        }
        _ => repacked_nar(&shared, format, &upload).await,
    }
}

/// The name in our narinfos, whatever the NAR's upload was called.
fn our_name(file: &str) -> Option<Sha256> {
    file.strip_suffix(".nar.zst").and_then(base32)
}

/// A NAR as it is stored.
fn stored_nar(shared: &ServerState, nar: OpenNar, hash: Sha256) -> Response {
    let size = nar.about.len();
    let body = serving::body(nar, hash, Arc::clone(&shared.store));
    let mut response = answer(shared, NAR_TYPE, body);
    response
        .headers_mut()
        // With the length, a client can tell a complete download from a broken one.
        .insert(header::CONTENT_LENGTH, HeaderValue::from(size));
    response
}

/// A NAR in another compression than the stored one.
async fn repacked_nar(
    shared: &ServerState,
    format: Format,
    upload: &Upload,
) -> Result<Response, ErrorResponse> {
    let turn = shared.repacking_turn().await?;
    let (hash, size) = (upload.nar_hash, upload.nar_size);
    let body = shared
        .run_blocking(move |store| serving::repacked(store.read_nar(&hash, size)?, format, turn))
        .await?;
    let mut response = answer(shared, NAR_TYPE, body);
    describe_repacked(&mut response, format, upload);
    Ok(response)
}

fn describe_repacked(response: &mut Response, format: Format, upload: &Upload) {
    if format == Format::None {
        let size = HeaderValue::from(upload.nar_size);
        response.headers_mut().insert(header::CONTENT_LENGTH, size);
    }
}

/// Receives a NAR in the compression chosen for `nix copy`, and keeps it until its narinfo arrives.
///
/// # Errors
/// 401, 403 or 404 before the body is read; 400 if the file does not match its name, 415 for
/// unsupported compressions.
pub(crate) async fn put_nar(
    State(shared): State<Arc<ServerState>>,
    Path((cache, file)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let (parts, body) = request.into_parts();
    let cache = shared
        .authorise(&parts.headers, &cache, Scope::Write)?
        .name
        .clone();
    // The name decides the decoder, so an unsupported compression fails before the upload.
    let UploadName { file_hash, format } = UploadName::parse(&file)?;
    // The size is not announced in this protocol, but an empty body is never right.
    check_length(&parts.headers, None)?;
    let _slot = shared.upload_slot(Cost::Compressed).await?;
    let taken = receive_compressed(&shared, &mut RequestBody::new(body), format, file_hash).await?;
    let upload = Upload {
        nar_hash: taken.nar_hash,
        nar_size: taken.nar_size,
        received_hash: taken.received_hash,
        received_size: taken.received_size,
    };
    shared
        .run_blocking(move |store| store.note_upload(&cache, &file, &upload))
        .await?;
    Ok(created(upload.received_size))
}

/// Receives a narinfo after its NAR, and accepts it if it matches what we measured ourselves.
///
/// # Errors
/// 401, 403 or 404 before the body is read; 400 if it is invalid or does not match the NAR.
pub(crate) async fn put_narinfo(
    State(shared): State<Arc<ServerState>>,
    Path((cache, file)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let (parts, body) = request.into_parts();
    let cache = shared
        .authorise(&parts.headers, &cache, Scope::Write)?
        .name
        .clone();
    // Any other file in a cache is read-only.
    let hash = path_hash(&file).map_err(|_| ErrorResponse::method_not_allowed())?;
    let memory = shared.metadata_slot(&parts.headers, NARINFO_LIMIT).await?;
    let text = RequestBody::new(body).read_all(NARINFO_LIMIT).await?;
    let text = String::from_utf8(text)
        .map_err(|_| ErrorResponse::bad_request("the narinfo is not UTF-8"))?;
    let info =
        NarInfo::parse(&text).map_err(|error| ErrorResponse::bad_request(error.to_string()))?;
    // The path in the narinfo decides where it is stored, so the address must agree.
    if info.path.hash() != hash {
        return Err(ErrorResponse::bad_request(format!(
            "the narinfo describes `{}`",
            info.path
        )));
    }
    drop(memory);
    check_claim(&shared, &cache, &info).await?;
    let path =
        check_narinfo(info).map_err(|error| ErrorResponse::bad_request(error.to_string()))?;
    let nar_hash = path.nar_hash;
    let nar = shared
        .run_blocking(move |store| store.known_nar(&nar_hash))
        .await?;
    let nar = nar.ok_or_else(|| {
        ErrorResponse::unavailable("the NAR was removed before it was claimed; send it again")
    })?;
    commit(&shared, &cache, path, nar).await?;
    Ok(created(text.len() as u64))
}

/// Checks that the NAR of a narinfo is one that this cache was sent: by the name under which it was uploaded, or, in a
/// narinfo of our own that comes back with another signature, by the name that we gave it.
async fn check_claim(
    shared: &ServerState,
    cache: &CacheName,
    info: &NarInfo,
) -> Result<(), ErrorResponse> {
    let name = info
        .url
        .strip_prefix("nar/")
        .filter(|name| UploadName::parse(name).is_ok())
        .map(str::to_owned);
    let name = name.ok_or_else(|| {
        ErrorResponse::bad_request("the narinfo's `URL` is not `nar/<file hash>.nar…`")
    })?;
    let (of, hash) = (cache.clone(), info.path.hash());
    if our_name(&name) == Some(info.nar_hash) {
        let served = shared
            .run_blocking(move |store| store.served(&of, &hash))
            .await?;
        if served.is_some_and(|served| {
            (served.nar_hash, served.nar_size) == (info.nar_hash, info.nar_size)
        }) {
            return Ok(());
        }
    }
    let of = cache.clone();
    let upload = shared
        .run_blocking(move |store| store.upload(&of, &name))
        .await?
        .ok_or_else(|| ErrorResponse::bad_request("the NAR must be uploaded before its narinfo"))?;
    // Hashes and sizes in the narinfo must match what was measured during the upload.
    check_fit(info, &upload)
}

fn check_fit(info: &NarInfo, upload: &Upload) -> Result<(), ErrorResponse> {
    let wrong = |field: &str| {
        Err(ErrorResponse::bad_request(format!(
            "the narinfo's `{field}` does not match the uploaded NAR"
        )))
    };
    if info.nar_hash != upload.nar_hash {
        wrong("NarHash")
    } else if info.nar_size != upload.nar_size {
        wrong("NarSize")
    } else if info
        .file_hash
        .is_some_and(|hash| hash != upload.received_hash)
    {
        wrong("FileHash")
    } else if info
        .file_size
        .is_some_and(|size| size != upload.received_size)
    {
        wrong("FileSize")
    } else {
        Ok(())
    }
}

/// Returns the cache if the client may read it. For substituters, a missing cache is a 404 like a
/// missing path.
fn readable<'a>(
    shared: &'a ServerState,
    headers: &HeaderMap,
    cache: &str,
) -> Result<&'a Cache, ErrorResponse> {
    if !shared.caches.contains_key(cache) {
        return Err(ErrorResponse::no_cache());
    }
    shared.authorise(headers, cache, Scope::Read)
}

fn path_hash(file: &str) -> Result<PathHash, ErrorResponse> {
    let hash = file
        .strip_suffix(".narinfo")
        .ok_or_else(ErrorResponse::not_found)?;
    PathHash::parse(hash).map_err(|_| ErrorResponse::no_object())
}

fn answer(shared: &ServerState, kind: &'static str, body: Body) -> Response {
    let mut response = body.into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if shared.options.public {
        response.headers_mut().insert(
            "x-attic-cache-visibility",
            HeaderValue::from_static("public"),
        );
    }
    response
}

fn created(received: u64) -> Response {
    let mut response = StatusCode::CREATED.into_response();
    response.extensions_mut().insert(BytesMoved(received));
    response
}
