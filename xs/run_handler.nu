# Keeps the closure of the script.nu beside it running: an input a line on file descriptor 3, an
# answer a line on standard output (docs/scripts.md tells the protocol).
#
# Each line of ours begins with a mark that no script can guess, since a script's own `print` goes
# to standard output too. The first says that the closure is one and waits.
#
# What runs for each frame is one block with as few commands as it takes (bench/scripts.py): one of
# Nushell's own costs 1 to 2 µs, one of ours 5, and one that takes `$in` 200.

use xs.nu *

const GATHERED = 7 # the tag under which .append sends what it is given
const END = "end of what this frame appends"

# What the closure appended while it ran, from the first on: .append sends it to this job.
def xs-gathered [first: any] {
  mut found: list<any> = [$first]
  while ($found | length) < 50 {
    let next = (job recv --tag $GATHERED)
    if $next == $END { return $found }
    $found = ($found | append $next)
  }
  # A stream costs more to begin with, but not each time as much as all before it.
  $found | append (generate {|_: any = 0|
    let next = (job recv --tag $GATHERED)
    if $next == $END { {} } else { {out: $next, next: 0} }
  })
}

# Output as JSON has it, where it has no type for something: bytes go as base64, a `ttl` as
# milliseconds; of other content its JSON is the text.
const NOT_IN_JSON = "binary|any|range|duration|date|glob|cell-path" # in the name of a type

def xs-plain [value: any] {
  match ($value | describe --detailed | get type) {
    "list" | "table" | "range" => ($value | each {|item| xs-plain-item $item })
    _ => (xs-plain-item $value)
  }
}

def xs-plain-item [value: any] {
  match ($value | describe --detailed | get type) {
    "binary" => {content_base64: ($value | encode base64)}
    "record" => (xs-plain-record $value)
    "datetime" | "range" | "glob" | "cell-path" => {content: ($value | to json --raw)}
    _ => $value
  }
}

def xs-plain-record [value: record] {
  # One that says where it goes.
  if content not-in $value or ($value | reject --optional topic meta ttl content more) != {} {
    return $value
  }
  let value = if ($value.ttl? | describe) != "duration" { $value } else {
    $value | update ttl ($value.ttl // 1ms)
  }
  match ($value.content | describe --detailed | get type) {
    "binary" => ($value | reject content | insert content_base64 ($value.content | encode base64))
    "datetime" | "range" | "glob" | "cell-path" => {
      $value | update content ($value.content | to json --raw)
    }
    _ => $value
  }
}

# A frame as a closure is given it: bytes that came as base64 are bytes again.
def xs-frame [frame: record] {
  let content = ($frame.content_base64 | decode base64)
  $frame | reject content_base64 | insert content $content
}

const RESULTS = [[], [state], [out], [state, out], [out, state]]

def xs-refuse [result: any] {
  error make --unspanned {
    msg: $"a stateful handler's closure returns {state?, out?} or null, not ($result | to nuon)"
  }
}

def xs-failed [error: record] {
  let text = ($error.rendered? | default ($error.msg? | default "it failed") | to json --raw)
  $"($env.XS_MARK){\"error\":($text)}\n"
}

# The line of any answer. `state` is that field as JSON, behind a comma; or nothing.
def xs-line [out: any, state: string, appended: any] {
  let text = (xs-plain $out | to json --raw)
  if $appended == null { $"($env.XS_MARK){\"out\":($text)($state)}\n" } else {
    let more = ($appended | to json --raw)
    $"($env.XS_MARK){\"out\":($text)($state),\"append\":($more)}\n"
  }
}

def xs-stateless [closure: closure] {
  each {|input|
    try {
      let frame = if $input.frame.content_base64? == null { $input.frame } else { xs-frame $input.frame }
      let out = (do $closure $frame)
      $END | job send 0 --tag $GATHERED
      let first = (job recv --tag $GATHERED)
      if $first != $END {
        xs-line $out "" (xs-gathered $first)
      } else if $out == null {
        $"($env.XS_MARK)null\n"
      } else {
        if ($out | describe) =~ $NOT_IN_JSON { xs-line $out "" null } else {
          let text = ($out | to json --raw)
          $"($env.XS_MARK){\"out\":($text)}\n"
        }
      }
    } catch {|error| xs-failed $error }
  }
}

def xs-stateful [closure: closure] {
  # The first input is the state to begin with.
  generate {|input, state: any = null|
    if $input.frame? == null { {out: "", next: $input.state} } else {
      try {
        let frame = if $input.frame.content_base64? == null { $input.frame } else { xs-frame $input.frame }
        let result = (do $closure $frame $state)
        $END | job send 0 --tag $GATHERED
        let first = (job recv --tag $GATHERED)
        let appended = if $first == $END { null } else { xs-gathered $first }
        match $result {
          null => {
            let line = if $appended == null { $"($env.XS_MARK)null\n" } else { xs-line null "" $appended }
            {out: $line, next: $state}
          }
          {state: $changed} => {
            if ($result | columns) not-in $RESULTS { xs-refuse $result }
            # Through JSON, so that it is the same before and after a restart.
            let text = ($changed | to json --raw)
            let line = if $result.out? == null and $appended == null {
              $"($env.XS_MARK){\"state\":($text)}\n"
            } else {
              xs-line $result.out? $",\"state\":($text)" $appended
            }
            {out: $line, next: ($text | from json)}
          }
          _ => {
            if ($result | describe) not-starts-with "record" { xs-refuse $result }
            if ($result | columns) not-in $RESULTS { xs-refuse $result }
            {out: (xs-line $result.out? "" $appended), next: $state}
          }
        }
      } catch {|error| {out: (xs-failed $error), next: $state} }
    }
  }
}

# Nushell's own builds have musl's allocator, which gives a page back as soon as nothing on it is in
# use, and in most scripts did so with every frame: a third of the time. Some texts of each small size
# that stay, with gaps between them, keep such pages. (In the environment: the variables of `main` are
# gone when its stream runs.)
def xs-ballast [] {
  1..35 | each {|n|
    let text = ("" | fill --width ($n * 8))
    1..20 | each { $text }
  } | flatten | every 2
}

def main [kind: string] {
  $env.XS_GATHER = {job: 0} # .append leaves its frames to this job: the main one
  let closure: any = (source script.nu)
  let found = ($closure | describe)
  if $found != "closure" {
    error make --unspanned {msg: $"the script is not a closure but a ($found): write {|frame| …}"}
  }
  $env.XS_BALLAST = (xs-ballast)
  print $"($env.XS_MARK)start"
  open --raw /dev/fd/3 | from json --objects | if $kind == "stateful" {
    xs-stateful $closure
  } else {
    xs-stateless $closure
  } | str join
}

# The same script once more, in a place that takes nothing but a closure: what is none is found
# before anything of it runs. Here at the end, so that other mistakes are told of the script itself.
use typed.nu
