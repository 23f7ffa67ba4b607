//! GitHub's Check Runs in memory, behind real HTTP: what it accepts is what GitHub's published description of
//! its API accepts.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jsonschema::Validator;
use serde_json::{Value, json};

/// GitHub's own limits on the text of a Check Run, and on annotations in one request.
const TITLE: usize = 255;
const TEXT: usize = 65_535;
const ANNOTATIONS: usize = 50;

/// How this GitHub answers.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    /// The token that it knows.
    pub token: String,
    /// The token may not write, as a fork's may not.
    pub refuses: bool,
    /// At most so many writes in so long a time; more are answered with a secondary limit.
    pub most: Option<(usize, Duration)>,
    /// Every n-th write gets this status with these headers, and is not done.
    pub limits: Option<(usize, u16, &'static str)>,
    /// Every n-th write is done, and the connection is closed without an answer.
    pub cuts: Option<usize>,
    /// Every n-th write gets 502, and is not done.
    pub fails: Option<usize>,
    /// No request gets an answer.
    pub hangs: bool,
}

/// A running GitHub; it ends with the test's process.
pub struct GitHub {
    /// The value for `GITHUB_API_URL`.
    pub url: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    manners: Manners,
    runs: BTreeMap<u64, Value>,
    /// Every change of a run: its name, its status, its conclusion.
    history: Vec<(String, String)>,
    /// The line of each request, and the status of its answer.
    log: Vec<(String, u16)>,
    writes: usize,
    recent: VecDeque<Instant>,
}

/// What is done with a request.
enum Done {
    Answered(u16, &'static str, Value),
    Cut,
}

impl GitHub {
    /// Starts one that knows a token. `refuses`: whether the token may not write, as a fork's may not.
    pub fn start(token: &str, refuses: bool) -> Self {
        Self::with(Manners {
            token: token.to_owned(),
            refuses,
            ..Manners::default()
        })
    }

    /// Starts one with manners of its own.
    pub fn with(manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            manners,
            ..State::default()
        }));
        let of_thread = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&of_thread);
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Self { url, state }
    }

    pub fn runs(&self) -> Vec<Value> {
        self.state.lock().unwrap().runs.values().cloned().collect()
    }

    /// The one Check Run of this name.
    #[track_caller]
    pub fn run(&self, name: &str) -> Value {
        let mut found: Vec<Value> = self
            .runs()
            .into_iter()
            .filter(|run| run["name"] == name)
            .collect();
        assert_eq!(
            found.len(),
            1,
            "Check Runs named {name}: {:?}",
            self.names()
        );
        found.remove(0)
    }

    pub fn names(&self) -> Vec<String> {
        self.runs()
            .iter()
            .map(|run| run["name"].as_str().unwrap().to_owned())
            .collect()
    }

    /// The names of the Check Runs that have not ended.
    pub fn open(&self) -> Vec<String> {
        let open = self
            .runs()
            .into_iter()
            .filter(|run| run["status"] != "completed");
        open.map(|run| run["name"].as_str().unwrap().to_owned())
            .collect()
    }

    /// The statuses that a run has had, in order: `queued`, `in_progress`, `completed`.
    pub fn history(&self, name: &str) -> Vec<String> {
        let state = self.state.lock().unwrap();
        state
            .history
            .iter()
            .filter(|(of, _)| of == name)
            .map(|(_, status)| status.clone())
            .collect()
    }

    /// Every request so far: method and path, and the status of its answer.
    pub fn log(&self) -> Vec<(String, u16)> {
        self.state.lock().unwrap().log.clone()
    }

    /// How many writes were done.
    pub fn writes(&self) -> usize {
        self.log()
            .iter()
            .filter(|(line, status)| !line.starts_with("GET") && (200..300).contains(status))
            .count()
    }

    /// Changes the behaviour from now on.
    pub fn behave(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.state.lock().unwrap().manners);
    }
}

/// The compiled schema of a fixture; compiling one is slow, so each is kept for the process.
fn schema(name: &'static str) -> &'static Validator {
    static READ: Mutex<BTreeMap<&str, &Validator>> = Mutex::new(BTreeMap::new());
    READ.lock()
        .unwrap()
        .entry(name)
        .or_insert_with(|| Box::leak(Box::new(read_schema(name))))
}

fn read_schema(name: &str) -> Validator {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/github")
        .join(name);
    let schema = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

fn serve(stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0_u64);
    while let Ok(1..) = reader.read_line(&mut head) {
        let line = head.lines().last().unwrap_or_default().to_lowercase();
        if let Some(number) = line.strip_prefix("content-length:") {
            length = number.trim().parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = Vec::new();
    reader.by_ref().take(length).read_to_end(&mut body).unwrap();
    let line = head
        .lines()
        .next()
        .unwrap_or_default()
        .trim_end_matches(" HTTP/1.1")
        .to_owned();
    if line.is_empty() {
        return;
    }
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    while state.lock().unwrap().manners.hangs {
        std::thread::sleep(Duration::from_millis(20));
    }
    let done = respond(
        &line,
        &head.to_lowercase(),
        &body,
        &mut state.lock().unwrap(),
    );
    let Done::Answered(status, headers, answer) = done else {
        state.lock().unwrap().log.push((line, 200));
        return;
    };
    state.lock().unwrap().log.push((line, status));
    let answer = answer.to_string();
    let head = format!(
        "HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}Connection: close\r\n\r\n",
        answer.len()
    );
    // A client that hangs up early gets no answer.
    let _ = reader
        .get_mut()
        .write_all(format!("{head}{answer}").as_bytes());
}

fn respond(line: &str, head: &str, body: &Value, state: &mut State) -> Done {
    let error = |status, message: &str| {
        Done::Answered(
            status,
            "",
            json!({ "message": message, "documentation_url": "" }),
        )
    };
    let manners = state.manners.clone();
    let authorised = head.contains(&format!(
        "authorization: bearer {}",
        manners.token.to_lowercase()
    ));
    if !authorised
        || !head.contains("x-github-api-version: 2022-11-28")
        || !head.contains("user-agent: ")
    {
        return error(401, "Bad credentials");
    }
    let (method, path) = line.split_once(' ').unwrap();
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    // Where GitHub Enterprise Server has its API.
    let path = path.strip_prefix("/api/v3").unwrap_or(path);
    let Some(path) = path
        .strip_prefix("/repos/octo-org/")
        .and_then(|path| path.split_once('/'))
        .map(|(_, path)| path)
    else {
        return error(404, "Not Found");
    };
    if method == "GET" {
        return list(path, query, state).unwrap_or_else(|| error(404, "Not Found"));
    }
    if manners.refuses {
        return error(403, "Resource not accessible by integration");
    }
    state.writes += 1;
    let is_due =
        |every: Option<usize>| every.is_some_and(|every| state.writes.is_multiple_of(every));
    if let Some((_, status, headers)) = manners.limits.filter(|(every, ..)| is_due(Some(*every))) {
        let text = "You have exceeded a secondary rate limit. Please wait a few minutes before you try again.";
        return Done::Answered(status, headers, json!({ "message": text }));
    }
    if let Some((most, time)) = manners.most {
        while state.recent.front().is_some_and(|at| at.elapsed() >= time) {
            state.recent.pop_front();
        }
        if state.recent.len() >= most {
            return Done::Answered(
                403,
                "",
                json!({ "message": "You have exceeded a secondary rate limit." }),
            );
        }
        state.recent.push_back(Instant::now());
    }
    if is_due(manners.fails) {
        return error(502, "Server Error");
    }
    let cut = is_due(manners.cuts);
    let done = write(method, path, body, state)
        .unwrap_or_else(|(status, problem)| error(status, &problem));
    if cut { Done::Cut } else { done }
}

fn list(path: &str, query: &str, state: &State) -> Option<Done> {
    let sha = path.strip_prefix("commits/")?.strip_suffix("/check-runs")?;
    let pairs: BTreeMap<String, String> = url::form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .collect();
    let number =
        |name: &str, usual: usize| pairs.get(name).map_or(usual, |text| text.parse().unwrap());
    let (page, size) = (number("page", 1), number("per_page", 30).min(100));
    let name = pairs.get("check_name");
    let found: Vec<&Value> = state
        .runs
        .values()
        .filter(|run| run["head_sha"] == sha && name.is_none_or(|name| run["name"] == **name))
        .collect();
    let part: Vec<&&Value> = found.iter().skip((page - 1) * size).take(size).collect();
    Some(Done::Answered(
        200,
        "",
        json!({ "total_count": found.len(), "check_runs": part }),
    ))
}

fn write(method: &str, path: &str, body: &Value, state: &mut State) -> Result<Done, (u16, String)> {
    let id = path
        .strip_prefix("check-runs/")
        .and_then(|id| id.parse::<u64>().ok());
    let (status, id) = match (method, path, id) {
        ("POST", "check-runs", _) => {
            wrong(schema("check-run-create.json"), body)
                .map_or(Ok(()), |problem| Err((422, problem)))?;
            let id = state.runs.len() as u64 + 1;
            state
                .runs
                .insert(id, json!({ "id": id, "status": "queued" }));
            (201, id)
        }
        ("PATCH", _, Some(id)) => {
            wrong(schema("check-run-update.json"), body)
                .map_or(Ok(()), |problem| Err((422, problem)))?;
            (200, id)
        }
        _ => return Err((404, "Not Found".to_owned())),
    };
    let run = state
        .runs
        .get_mut(&id)
        .ok_or((404, "Not Found".to_owned()))?;
    for (key, value) in body.as_object().unwrap() {
        match key.as_str() {
            // GitHub adds the annotations of an update to those that are there.
            "output" => {
                let mut marks = run["output"]["annotations"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                marks.extend(value["annotations"].as_array().cloned().unwrap_or_default());
                run["output"] = value.clone();
                run["output"]["annotations"] = marks.into();
            }
            _ => run[key] = value.clone(),
        }
    }
    if run["status"] != "completed" {
        run["conclusion"] = Value::Null;
    }
    let (run, text) = (run.clone(), |value: &Value| {
        value.as_str().unwrap().to_owned()
    });
    state
        .history
        .push((text(&run["name"]), text(&run["status"])));
    Ok(Done::Answered(status, "", run))
}

/// Why GitHub would answer 422: by its published schema, and by rules that the schema leaves out.
fn wrong(schema: &Validator, body: &Value) -> Option<String> {
    if let Some(error) = schema.iter_errors(body).next() {
        return Some(error.to_string());
    }
    if body["status"] == "completed" && body["conclusion"].is_null() {
        return Some("a completed run needs a conclusion".to_owned());
    }
    let output = &body["output"];
    let long = |value: &Value, most: usize| {
        value
            .as_str()
            .is_some_and(|text| text.chars().count() > most)
    };
    if long(&output["title"], TITLE)
        || long(&output["summary"], TEXT)
        || long(&output["text"], TEXT)
    {
        return Some("Invalid request.\n\nThe output is too long".to_owned());
    }
    if output["annotations"]
        .as_array()
        .is_some_and(|marks| marks.len() > ANNOTATIONS)
    {
        return Some("No more than 50 annotations are supported".to_owned());
    }
    let is_stamp = |text: &str| {
        let pattern = "dddd-dd-ddTdd:dd:ddZ";
        text.len() == pattern.len()
            && text
                .chars()
                .zip(pattern.chars())
                .all(|(c, p)| if p == 'd' { c.is_ascii_digit() } else { c == p })
    };
    let stamps = ["started_at", "completed_at"].map(|key| body[key].as_str());
    stamps
        .into_iter()
        .flatten()
        .find(|text| !is_stamp(text))
        .map(|text| format!("`{text}` is no time stamp"))
}

#[test]
fn this_github_refuses_what_github_refuses() {
    let create = schema("check-run-create.json");
    let sha = "a".repeat(40);
    assert_eq!(
        wrong(
            create,
            &json!({ "name": "x", "head_sha": sha, "status": "queued" })
        ),
        None
    );
    for body in [
        json!({ "name": "x", "status": "queued" }),
        json!({ "name": "x", "head_sha": sha, "status": "completed" }),
        json!({ "name": "x", "head_sha": sha, "status": "completed", "conclusion": "fine" }),
        json!({ "name": "x", "head_sha": sha, "status": "queued", "started_at": "2026-01-01 00:00:00" }),
        json!({ "name": "x", "head_sha": sha, "status": "queued", "output": { "title": "x" } }),
    ] {
        assert!(wrong(create, &body).is_some(), "{body}");
    }
}
