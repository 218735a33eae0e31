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
// # Mirrors
//
// [Options].Hosts is a folder as containerd's config_path names it, and is read as containerd reads it. The first of
// HOST_PORT_, HOST:PORT (or HOST) and _default that exists counts. Its hosts.toml lists hosts, with their certificates
// and headers, and at the end comes the upstream: the server that it names, or else the registry itself. Without a hosts.toml,
// the folder has docker's *.crt, *.cert and *.key for the registry. Keys that are not known are ignored; a value that is
// wrong is an error of [Open], where containerd would go on without the file.
//
// A request goes to the hosts in that order until one has what is wanted. Whatever else it says, or nothing at all for
// ten seconds, is its error, and the next is asked at once. If all fail, those whose trouble may pass are asked
// again: mirrors once, the upstream with the patience that a registry has when it is alone. The error says what each
// said, and is [ErrNotFound] or [ErrNoRanges] if the upstream's is. Three things change the order:
//
//   - Who answered last for a blob is asked first for its next range.
//   - Whose stream of a blob broke, or brought bytes that were not the blob's, is asked last for it. So a reader who asks again for
//     what is missing gets it from elsewhere.
//   - A host that could not be reached, or was silent, is asked last for half a minute, by all images of the process.
//     A dead mirror thus costs who meets it first, and not each range.
//
// No error is kept. A host without "resolve" among its capabilities is not asked what a tag means. A host that is not the namespace's own
// is told it: ?ns=docker.io. Each host has a login of its own, which is looked up by its name (registry-1.docker.io's by
// index.docker.io's, as docker login keeps it), and headers that are set for it go to it only, not to where it redirects.
//
// Sources: the OCI distribution, image and image-layout specifications
// (https://github.com/opencontainers), the registry token protocol
// (https://distribution.github.io/distribution/spec/auth/token/), RFC 9110 for ranges, containerd's docs/hosts.md.
package remote
