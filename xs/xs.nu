# The commands of xs for Nushell: `use xs.nu *`, then `"hello" | .append notes`.
#
# They ask a store's server with Nushell's own `http`, over its socket or TCP, and start no other
# program. The server is the one at $env.XS_ADDR, or at --addr: a store's directory, a socket's
# path, HOST:PORT, :PORT, or http(s)://HOST[:PORT]. A token goes before the host, TOKEN@HOST:PORT,
# or into $env.XS_TOKEN.
#
# Needs Nushell 0.109.1 or newer. Each `use` parses all of it, which takes 25 µs for a call, a block
# or a `let`, whether or not it ever runs: so there are few of them.

# ---- Completions: known before the commands that name them --------------------------------------

def topics [] { try { .cat --last 500 | get topic | uniq } catch { [] } }

def ids [] {
  try { .cat --last 50 | each {|it| {value: $it.id, description: $it.topic} } } catch { [] }
}

def ttls [] { [forever ephemeral 1day last:1] }

# ---- Writing ------------------------------------------------------------------------------------

# Append an event with what is piped in as its content, and return its frame.
#
# A string is stored as text, bytes as they are (a stream of them as it comes), anything else as
# JSON. With nothing piped in, the frame has no content. In a handler it returns nothing: the frame
# is stored together with all else that its input causes.
@example "text" { "hello" | .append notes }
export def ".append" [
  topic: string@topics # its name, such as notes or notes.add
  --meta: any # a record, or any value that JSON has
  --ttl: oneof<duration, int, string>@ttls # how long it is kept: forever, ephemeral, 1day, last:5
  --if-last: string@ids # only if the topic's newest frame has this id (none: if it has no frame)
  --key: string # the same key again on the topic answers the same frame, and appends nothing
  --addr: string # the store's server, in place of $env.XS_ADDR
]: any -> any {
  # In a handler this is a record, so no Nushell that the handler starts is given it: its frames are
  # its own.
  match $env.XS_GATHER? {
    {job: $job} => {
      gather $job [[topic $topic] [meta $meta] [ttl (milliseconds $ttl)]] [$if_last $key $addr] (
        metadata $topic
      )
    }
    _ => {
      post [append $topic] {ttl: (milliseconds $ttl), if-last: $if_last} $addr {
        topic: (metadata $topic)
        meta: (metadata $meta)
        ttl: (metadata $ttl)
        "if-last|newest": (metadata $if_last)
        key: (metadata $key)
      } (fields $meta $key)
    }
  }
}

# Store what is piped in as content without a frame, and return its hash.
export def ".cas-post" [
  --addr: string # the store's server, in place of $env.XS_ADDR
]: any -> string {
  post [cas] {} $addr {addr: (metadata $addr)}
}

# Remove a frame, and its content if no other frame has it.
export def ".remove" [
  id: string@ids # the frame's id
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> nothing {
  ask delete [$id] {} $addr {id: (metadata $id)}
}

# The same as .remove.
export alias ".rm" = .remove

# ---- Reading ------------------------------------------------------------------------------------

# The stream: a list of frames, each given as it comes.
#
# A position is an id, a time (2026-01-31T09:30:00Z), or how long ago (2hr).
@example "what came in the last two hours" { .cat --from 2hr }
export def ".cat" [
  --follow (-f) # go on with live frames, after one xs.threshold
  --pulse (-p): oneof<duration, int> # follow, with an xs.pulse that often (a number: milliseconds)
  --new (-n) # only what comes from now on
  --tail (-t) # the same as --new
  --after (-a): oneof<duration, datetime, string>@ids # start after this position
  --last-id (-l): oneof<duration, datetime, string>@ids # the same as --after
  --from: oneof<duration, datetime, string>@ids # start with this position
  --until: oneof<duration, datetime, string>@ids # end with this position
  --limit: int # end after so many frames
  --last: int # only the newest so many of these, oldest first
  --topic (-T): string@topics # only a topic, prefix.*, or several with commas
  --with-timestamp # add `timestamp` to each frame
  --with-content # add `content` to each frame: text, or bytes if it is none
  --no-chunks # without frames that continue a chunked content
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> list<any> {
  ask get [] {
    follow: (if $pulse == null { $follow } else { milliseconds $pulse | number })
    new: ($new or $tail)
    after: $after
    last-id: $last_id
    from: $from
    until: $until
    limit: $limit
    last: $last
    topic: $topic
    with-timestamp: $with_timestamp
    with-content: $with_content
    no-chunks: $no_chunks
  } $addr {
    addr: (metadata $addr)
    topic: (metadata $topic)
    after: (metadata $after)
    from: (metadata $from)
    until: (metadata $until)
    follow: (metadata $pulse)
  }
}

# A frame.
export def ".get" [
  id: string@ids # its id
  --with-timestamp # add `timestamp`
  --with-content # add `content`: text, or bytes if it is none
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> record {
  ask get [$id] {with-timestamp: $with_timestamp, with-content: $with_content} $addr {
    id: (metadata $id)
  }
}

# The frame after an id, which need not be stored.
export def ".next" [
  id: string@ids # an id
  --topic (-T): string@topics # only a topic, prefix.*, or several with commas
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> record {
  ask get [next $id] {topic: $topic} $addr {id: (metadata $id)}
}

# The frame before an id, which need not be stored.
export def ".prev" [
  id: string@ids # an id
  --topic (-T): string@topics # only a topic, prefix.*, or several with commas
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> record {
  ask get [prev $id] {topic: $topic} $addr {id: (metadata $id)}
}

# The oldest frame, of all or of a topic; with a number, a list of the oldest so many.
export def ".first" [
  topic?: oneof<int, string>@topics # a topic, or a pattern of topics
  count?: int # how many
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> any {
  end first $topic $count false $addr {topic: (metadata $topic)}
}

# The newest frame, of all or of a topic; with a number, a list of the newest so many, oldest first.
export def ".last" [
  topic?: oneof<int, string>@topics # a topic, or a pattern of topics
  count?: int # how many
  --follow (-f) # then each newer one, as it comes
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> any {
  end last $topic $count $follow $addr {topic: (metadata $topic)}
}

# The same as .last.
export alias ".head" = .last

# The content that has a hash: text, or bytes if it is none.
@example "the newest note's text" { .cas (.last notes).hash }
export def ".cas" [
  hash: string # the hash, as a frame has it
  --raw (-r) # bytes as they come: for what is large, or is to be saved
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> any {
  ask get [cas $hash] {} $addr {hash: (metadata $hash)} (if not $raw { 'text' })
}

# A frame's content: text, or bytes if it is none; nothing if the frame has none.
export def ".content" [
  id: string@ids # the frame's id
  --raw (-r) # bytes as they come: for what is large, or is to be saved
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> any {
  ask get [content $id] {} $addr {id: (metadata $id)} (if not $raw { 'text' })
}

# The server's version.
export def ".version" [
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> record {
  ask get [version] {} $addr {addr: (metadata $addr)}
}

# ---- Scripts ------------------------------------------------------------------------------------

# What the server runs: generators, handlers, scripts.
export def ".ps" [
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> list<any> {
  ask get [ps] {} $addr {addr: (metadata $addr)}
}

# Run a script in the server, and return what it yields.
#
# The script is text, or a closure: of that its source is sent, not the variables around it.
export def ".eval" [
  script: oneof<closure, string> # the script
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> any {
  script-text $script | post [eval] {} $addr {script: (metadata $script)}
}

# Run a script in the server with a frame as its input, and return what it yields.
#
# The script is text, or a closure: of that its source is sent, not the variables around it.
@example "the newest note backwards" { .pipe (.last notes).id {|| .cas $in.hash | str reverse } }
export def ".pipe" [
  id: string@ids # the frame's id
  script: oneof<closure, string> # the script
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> any {
  script-text $script | post [pipe $id] {} $addr {script: (metadata $script), id: (metadata $id)}
}

# Try a handler's closure on the frames that are piped in, storing nothing.
#
# It is called as the server would call it, one frame after the other. For each it gives what the
# closure returned (`out`), the state after it, and what it would have appended.
export def ".step" [
  handler: closure # {|frame| …}, or with --stateful {|frame, state| …}
  --stateful # the closure is given the state, and returns {state?, out?} or nothing
  --initial-state: any # the state at first
]: any -> list<any> {
  step $handler $stateful $initial_state (metadata $handler)
}

# ---- Whole stores -------------------------------------------------------------------------------

# Write the store to a new folder: frames.jsonl, and cas/ with the contents.
export def ".export" [
  folder: path # a new folder
  --addr: string # the store's server, in place of $env.XS_ADDR
]: nothing -> nothing {
  if (glob ($folder | path join *) | is-not-empty) {
    fail $"can't export to ($folder): it is not empty" "this folder" (metadata $folder)
  }
  mkdir ($folder | path join cas)
  ask get [] {with-content: true} $addr {folder: (metadata $folder)} lines | each {|line|
    let frame = $line | from json | with-bytes
    if $frame.hash != null {
      if $frame.content? == null { .cas $frame.hash --raw --addr $addr } else { $frame.content }
      | save --raw --force ([$folder cas ($frame.hash | encode base64)] | path join)
    }
    # The line as it came, less the content at its end: JSON written again might be another.
    ($line | str replace --regex ',"content(_base64)?":"([^"\\]|\\.)*"\}$' '}') + "\n"
  } | str join | save --raw ($folder | path join frames.jsonl.part)
  # A folder with a frames.jsonl is whole.
  mv ($folder | path join frames.jsonl.part) ($folder | path join frames.jsonl)
}

# Store frames as they are, ids included: an exported folder, or what is piped in (frames with their
# content, as `.cat --with-content` gives them, or NDJSON).
export def ".import" [
  folder?: path # an exported folder
  --addr: string # the store's server, in place of $env.XS_ADDR
]: any -> record {
  if $folder == null { as-it-is } else {
    if ($folder | path join frames.jsonl | path type) != file {
      fail $"not an exported folder: ($folder) has no frames.jsonl" "this one" (metadata $folder)
    }
    let cas = $folder | path join cas
    for it in (if ($cas | path exists) { ls --all $cas | where type == file } else { [] }) {
      open --raw $it.name | post [cas] {for: import} $addr {addr: (metadata $addr)}
    }
    open --raw ($folder | path join frames.jsonl)
  } | post [import] {} $addr {addr: (metadata $addr)} | if $in.errors == [] { $in } else {
    fail (
      $"($in.imported) imported, ($in.errors | length) refused; "
      + $"line ($in.errors.0.line): ($in.errors.0.error)"
    ) "the store refused some" (metadata $addr)
  }
}

# ---- What the commands share --------------------------------------------------------------------
#
# `at`: the metadata of the caller's arguments, by the words that the store's sentences use for
# them; an error that names none of them points at the first. (What was not given stands where the
# command does.)

def end [which: string, topic: any, count: any, follow: bool, addr: any, at: record] {
  if ($topic | describe) == "int" { return (end $which null $topic $follow $addr $at) }
  ask get [$which $topic] {$which: $count, follow: $follow} $addr $at
  | if $count == null { as-it-is } else { append [] } # a list, also of one
}

# What is piped in, a stream as well.
def as-it-is [] { metadata access {||} }

def milliseconds [value: any] {
  if ($value | describe) == "duration" { $value // 1ms } else { $value }
}

# A number that nobody takes for no or yes, as 0 and 1 would be.
def number []: int -> string {
  if $in in [0 1] { $"0($in)" } else { $"($in)" }
}

# Fields of an append. A head has plain text in one line: other JSON goes as base64.
def fields [meta: any, key: any] {
  if $meta == null { return (known [[idempotency-key $key]]) }
  let text = $meta | to json --raw
  let text = if $text =~ '^[ -~]*$' { $text } else { $text | encode base64 }
  known [[xs-meta $text] [idempotency-key $key]]
}

# A record of those pairs that have a value. (`where`, `each` and `items` would take ten times as
# long for so few, since each of them makes its closure a world of its own.)
def known [pairs: list<any>] {
  mut found = {}
  for pair in $pairs { if $pair.1 != null { $found = ($found | insert $pair.0 $pair.1) } }
  $found
}

# Leaves a frame to the handler, or the .step, in which this runs, by the mailbox of its job.
def gather [job: int, frame: list<any>, refused: list<any>, at: record] {
  let content = $in
  if $refused != [null null null] {
    fail (
      "no --if-last, --key or --addr in a handler: its frames are stored with all else that its "
      + "input causes"
    ) "in this append" $at
  }
  known ($frame | append [(match ($content | describe) {
    "string" | "nothing" => [content $content]
    "binary" => [content_base64 ($content | encode base64)]
    _ => [content ($content | to json --raw)]
  })]) | job send $job --tag 7
}

def step [handler: closure, stateful: bool, initial_state: any, at: record] {
  prepend {next: ($initial_state | to json --raw | from json)} | where topic? != xs.threshold
  | generate {|frame, state: any = null|
    if $frame.id? == null { return $frame } # the one that was put before them
    let found = with-env {XS_GATHER: {job: (job id)}} {
      if $stateful { do $handler $frame $state | default {} } else { {out: (do $handler $frame)} }
    }
    if ($found | describe) !~ '^record' or ($found | reject --optional state out) != {} {
      fail (
        $"a stateful handler returns {state?, out?} or nothing, not ($found | to nuon)"
      ) "this one" $at
    }
    let state = if state in $found { $found.state } else { $state } | to json --raw | from json
    {out: {frame_id: $frame.id, out: $found.out?, state: $state, append: (gathered)}, next: $state}
  }
}

# What .append has left since.
def gathered [] {
  "end" | job send (job id) --tag 7
  mut found: list<any> = []
  loop {
    let it = job recv --tag 7
    if $it == "end" { return $found } else { $found ++= [$it] }
  }
}

def script-text [script: any] {
  if ($script | describe) == "closure" { $"do (view source $script)" } else { $script }
}

# Sends what is piped in: text and bytes as they are, else JSON, of a list for .import a line each.
# What it is must be told without taking it in, since it may be a long stream, or a slow one.
def post [path: list<any>, parameters: record, addr: any, at: record, fields: record = {}] {
  by-kind (random int) ($path == [import]) {
    # The type is said: else `http` takes one from what made the input, and writes JSON anew by it.
    ask post $path $parameters $addr $at --fields {
      type: $"application/(if $path == [import] { 'x-ndjson' } else { 'octet-stream' })"
      more: $fields
    }
  }
}

def by-kind [tag: int, lines: bool, send: closure] {
  tee { describe --no-collect | job send (job id) --tag $tag }
  | match [(job recv --tag $tag | split row " " | first) $lines] {
    [nothing _] => ("" | do $send)
    [string _] | [binary _] | [byte _] => { do $send }
    [_ true] => { each {|frame| frame-line $frame } | str join | do $send }
    _ => { to json --raw | do $send }
  }
}

def frame-line [frame: any] {
  (if ($frame.content? | describe) != "binary" { $frame } else {
    $frame | insert content_base64 ($frame.content | encode base64) | reject content
  } | to json --raw) + "\n"
}

# A frame's content as bytes, when it came as base64.
def with-bytes [] {
  if $in.content_base64? == null { $in } else {
    insert content ($in.content_base64 | decode base64) | reject content_base64
  }
}

# ---- Requests -----------------------------------------------------------------------------------

# Makes a request with what is piped in, and of its answer a value by its type. `form`: "text", if
# bytes that are text shall be; "lines", if frames shall stay as they are written.
def ask [
  method: string
  path: list<any>
  parameters: record
  addr: any
  at: record
  form?: any
  --fields: any
] {
  exchange $method (door ($addr | default $env.XS_ADDR?) ($at | values | first)) (
    target $path $parameters
  ) $fields $at ($form | default $parameters.with-content?)
}

def exchange [
  method: string, door: record, target: string, fields: any, at: record, form: any
] {
  # Not `try`, which would wait for the end of a stream.
  do --ignore-errors { transmit $method $door $target $fields } | metadata access {|meta|
    match [$meta.http_response?.status? (type-of $meta) $form] {
      [null ..] => { unreachable $door $at }
      [200 application/json true] => { from json | with-bytes }
      [200 application/json _] => { from json }
      [200 application/x-ndjson lines] => { lines }
      [200 application/x-ndjson true] => { from json --objects | each { with-bytes } }
      [200 application/x-ndjson _] => { from json --objects }
      [200 application/octet-stream text] => { text-or-bytes }
      [200 application/octet-stream _] => { skip 0 }
      [200 ..] => { collect } # text
      [204 ..] => { ignore }
      _ => { refuse $meta.http_response $at }
    }
  }
}

def type-of [meta: record] {
  ($meta.http_response?.headers? | default [] | transpose -rd).content-type?
}

# Text, if the bytes are UTF-8.
def text-or-bytes [] {
  let bytes = $in | into binary
  let text = $bytes | decode utf-8
  if $bytes == 0x[] { null } else if ($text | into binary) == $bytes { $text } else { $bytes }
}

def target [path: list<any>, parameters: record] {
  mut target = ""
  for part in $path { if $part != null { $target += $"/(quote $part)" } }
  mut before = "?"
  for name in ($parameters | columns) {
    let value = $parameters | get $name
    if $value not-in [null false] {
      $target += $"($before)($name)=(quote $value)"
      $before = "&"
    }
  }
  if $path == [] { $"/($target)" } else { $target }
}

# Text for one part of a path, or for a value in a query (RFC 3986, 2.1).
def quote [value: any] {
  match ($value | describe) {
    "duration" => $"($value // 1ms)ms"
    "datetime" => ($value | format date "%+" | url encode --all)
    # What is dots alone, or nothing, would lead elsewhere: it gets a blank.
    "string" if $value in ["" "." ".."] => $"($value)%20"
    _ => ($value | into string | url encode --all)
  }
}

def transmit [method: string, door: record, target: string, fields: any] {
  match [$method $door.socket] {
    [get null] => { http get -re -H $door.fields ($door.url + $target) }
    [post null] => {
      http post -re -t $fields.type -H ($fields.more | merge $door.fields) ($door.url + $target)
    }
    [_ null] => { http delete -re -H $door.fields ($door.url + $target) }
    # An error at the next line: Nushell is older than 0.109.1, and too old.
    [get _] => { http get -re --unix-socket $door.socket ($door.url + $target) }
    [post _] => {
      http post -re -t $fields.type -H $fields.more --unix-socket $door.socket (
        $door.url + $target
      )
    }
    _ => { http delete -re --unix-socket $door.socket ($door.url + $target) }
  }
}

# What was wrong, if there is no answer.
def unreachable [door: record, at: record] {
  try { transmit get $door /version {} | ignore } catch {|error|
    if $door.url =~ '^https:' and $error.rendered =~ 'io::invalid_data' {
      fail (
        $"no TLS answers at ($door.addr), or with a certificate that isn't known here: what speaks "
        + "none is called by http:// in place of https://"
      ) "no TLS there" ($at | values | first)
    }
    if $error.rendered !~ 'not_found|connection_refused|dns::' { return $error.raw }
    fail (
      $"no server answers at ($door.addr): start one with `xs serve DIR` \(TCP: --expose\), or use "
      + "the `xs` command, which works on a directory without one"
    ) "nobody is there" ($at | values | first)
  }
  fail (
    "no answer: what is piped in has failed on its way, or meta or key is nothing that a request's "
    + "head can have (Nushell's has 128 KiB)"
  ) "in this call" ($at | values | first)
}

# Where requests go.
def door [addr: any, at: record] {
  if $addr in [null ""] {
    fail (
      "no address: give --addr, or set $env.XS_ADDR to a store's directory or HOST:PORT"
    ) "needs one" $at
  }
  if $addr !~ '^(https?://|[^/]*:[^/]*$)' {
    let path = $addr | path expand --no-symlink
    let rest = if ($path | path type) == socket { [] } else { [sock] }
    return {socket: ($path | path join ...$rest), url: "http://localhost", addr: $addr}
  }
  let it = $addr | parse --regex '^(?<scheme>https?://|)(?:(?<token>.+)@|)(?<host>.*?)/?$' | first
  {
    addr: $addr
    socket: null
    url: $"($it.scheme | default --empty 'http://')($it.host | str replace -r '^:' localhost:)"
    fields: (known [[authorization (bearer ($it.token | default --empty $env.XS_TOKEN?))]])
  }
}

def bearer [token: any] {
  if ($token | is-empty) { null } else { $"Bearer ($token)" }
}

# The store's own sentence, pointing at the argument that it names.
def refuse [answer: record, at: record] {
  let said = $in | str trim
  let said = $answer.headers | where name == xs-error | get --optional 0.value | default $said
  let named = $at | columns | where {|name|
    $said =~ $"^\(not an? |the |xs-\)?\(idempotency \)?\(($name)\)"
  }
  fail $said $"the store answers ($answer.status)" ($at | get ($named ++ ($at | columns) | first))
}

def fail [sentence: string, label: string, at: record] {
  null | error make {msg: $sentence, label: {text: $label, span: $at.span}}
}
