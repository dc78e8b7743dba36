//! One connection's conversation: negotiation, then commands. Knows nothing of sockets.

use super::args::Arguments;
use super::codec::{DecodeError, encode};
use super::commands::{self, Command, Held, Run};
use super::outbox::Outbox;
use super::{CommandError, CommandResult, ErrorClass, Events, Host};
use serde_json::{Map, Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The release of QEMU whose commands, results and error texts these are.
const QEMU_VERSION: [u32; 3] = [10, 0, 0];
const NEGOTIATE: &str = "qmp_capabilities";

/// What `query-version` and the greeting say.
pub fn version() -> Value {
    let [major, minor, micro] = QEMU_VERSION;
    json!({
        "qemu": { "major": major, "minor": minor, "micro": micro },
        "package": concat!("fleecefs ", env!("CARGO_PKG_VERSION")),
    })
}

/// The first message of every connection. Out-of-band execution is not offered: no command here blocks another
/// connection's.
pub fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// The state of one connection.
pub struct Session {
    host: Arc<dyn Host>,
    events: Arc<Events>,
    outbox: Arc<Outbox>,
    negotiated: bool,
    held: Held,
}

/// A command as it came in, with its members checked.
struct Request {
    name: String,
    arguments: Arguments,
}

impl Session {
    /// A fresh connection; queues the greeting.
    pub fn new(host: Arc<dyn Host>, events: Arc<Events>, outbox: Arc<Outbox>) -> Session {
        outbox.push_reply(encode(&greeting()));
        Session { host, events, outbox, negotiated: false, held: Held::default() }
    }

    /// Answers one message; false where the connection is to end.
    pub fn handle(&mut self, input: Result<Value, DecodeError>) -> bool {
        let fatal = input.as_ref().is_err_and(|e| e.fatal);
        let (id, outcome, command) = match input {
            Err(e) => (None, Err(CommandError::generic(e.text)), None),
            Ok(mut input) => {
                let id = input.as_object_mut().and_then(|members| members.remove("id"));
                let (outcome, command) = self.execute(input);
                (id, outcome, command)
            }
        };
        let done = outcome.is_ok();
        if !self.outbox.push_reply(encode(&reply(id, outcome))) || fatal {
            return false;
        }
        if let Some(after) = command.filter(|_| done).and_then(|command| command.after) {
            after(&*self.host);
        }
        true
    }

    fn execute(&mut self, input: Value) -> (CommandResult, Option<&'static Command>) {
        let request = match check(input) {
            Ok(request) => request,
            Err(e) => return (Err(e), None),
        };
        if !self.negotiated {
            return (self.negotiate(request), None);
        }
        let Some(command) = commands::find(&request.name) else {
            let desc = format!("The command {} has not been found", request.name);
            return (Err(CommandError::not_found(desc)), None);
        };
        // A bug in a command must cost neither the mount nor this connection.
        let run = AssertUnwindSafe(|| match command.run {
            Run::Plain(run) => run(&*self.host, request.arguments),
            Run::Holding(run) => run(&*self.host, &mut self.held, request.arguments),
        });
        let outcome = catch_unwind(run).unwrap_or_else(|_| Err(CommandError::generic("internal error; see the log")));
        (outcome, Some(command))
    }

    fn negotiate(&mut self, request: Request) -> CommandResult {
        if request.name != NEGOTIATE {
            return Err(CommandError::not_found(format!("Expecting capabilities negotiation with '{NEGOTIATE}'")));
        }
        let mut arguments = request.arguments;
        let enable = arguments.strings("enable")?;
        arguments.finish()?;
        if let Some((index, name)) = enable.iter().enumerate().find(|(_, name)| *name != "oob") {
            let desc = format!("Parameter 'enable[{index}]' does not accept value '{name}'");
            return Err(CommandError::generic(desc));
        }
        if !enable.is_empty() {
            return Err(CommandError::generic("Capability oob not available"));
        }
        self.negotiated = true;
        self.events.listen(&self.outbox);
        Ok(json!({}))
    }
}

/// Checks the members of a command object, with QEMU's texts.
fn check(input: Value) -> Result<Request, CommandError> {
    let Value::Object(mut members) = input else {
        return Err(CommandError::generic("QMP input must be a JSON object"));
    };
    let name = members.remove("execute");
    let arguments = members.remove("arguments");
    if let Some(member) = members.keys().next() {
        return Err(CommandError::generic(format!("QMP input member '{member}' is unexpected")));
    }
    let name = match name {
        None => return Err(CommandError::generic("QMP input lacks member 'execute'")),
        Some(Value::String(name)) => name,
        Some(_) => return Err(CommandError::generic("QMP input member 'execute' must be a string")),
    };
    let arguments = match arguments {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(CommandError::generic("QMP input member 'arguments' must be an object")),
    };
    Ok(Request { name, arguments: Arguments::new(arguments) })
}

fn reply(id: Option<Value>, outcome: CommandResult) -> Value {
    let mut message = match outcome {
        Ok(value) => json!({ "return": value }),
        Err(e) => json!({ "error": e.to_json() }),
    };
    if let Some(id) = id {
        message["id"] = id;
    }
    message
}

/// What `qmp_capabilities` says once negotiation is over.
pub fn already_negotiated() -> CommandError {
    CommandError {
        class: ErrorClass::CommandNotFound,
        ..CommandError::generic("Capabilities negotiation is already complete, command ignored")
    }
}
