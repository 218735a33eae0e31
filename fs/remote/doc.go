// Package remote reads images where they lie: in a registry, in an OCI image
// layout, or in an archive that docker save wrote.
//
// A [Reference] says which image is meant and where. [Open] gives the [Source]
// of its content, [Pick] the one [Image] in it that fits a platform. Manifests
// and configs are small, are read whole, and are checked against their digest
// before anybody sees them. Layers are large and are read by ranges: a [Blob]
// gives any bytes of a layer as a stream. Those bytes are not verified, because
// the digest of a blob says nothing about a part of it. Whoever reads a range
// checks what it read against the digests of the layer's table of contents.
//
// # Requests
//
// A round trip is what a start waits for, so none is spent on a question whose
// answer is known. Nothing asks /v2/ first, nothing sends HEAD, and the size
// of a blob is what its descriptor says. Opening an image of n layers and reading
// one range of each takes n+3 requests at most: index, manifest, config, and
// n ranges. Three things cost more, once per Source: a registry
// that wants a token (the refused request and the token's), one near by that does
// not speak TLS (a handshake), and, for each blob, a redirect to an object
// store. [Source.Stats] has the counts.
//
// # What can go wrong
//
// The first answer of a server is retried, with growing pauses, when the
// connection breaks and when the server says that it is overloaded or broken. A stream that has
// begun is not: it ends with an error, also when nothing
// arrives for half a minute, and its reader knows best which bytes it still needs.
// There is no limit on how long a range takes that keeps coming: slow is not broken.
//
// Credentials go to the registry and to the token server it names, never to the
// host that a redirect names. A public registry is spoken to by TLS
// only; one on this machine or in a private network may be without, as it
// is for docker.
//
// Everything that is read is bounded: manifests at 4 MiB as registries do,
// configs at 8 MiB, the tables of an archive by the number of its members. No name
// in an archive or layout is ever joined to a path outside of it.
//
// Errors are sentences for the person who typed the reference. A caller branches only
// on [ErrNotFound] and [ErrNoRanges].
//
// # Place of mirrors
//
// A Source is one origin. Mirrors will be a Source that holds an ordered list of Sources,
// and asks the next when one fails; nothing below this package's
// interface needs to change for them.
//
// Sources: the OCI distribution, image and image-layout specifications
// (https://github.com/opencontainers), the registry token protocol
// (https://distribution.github.io/distribution/spec/auth/token/), RFC 9110 for ranges.
package remote
