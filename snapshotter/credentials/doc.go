// Package credentials is where the daemon's registry credentials come from.
//
// A [Keychain] answers for a repository what to log in with. In go what an image was pulled with, and what
// docker's configuration and its credential helpers say; out come authn.Authenticators. A [Proxy] stands between
// the kubelet and containerd and shows a Keychain the credentials of every pull: a kubelet has them from pull
// secrets and credential providers, hands them to containerd, and containerd hands them to nobody. A lazy
// image needs them for as long as it runs, so they are kept on disk: a daemon that starts
// again reads on without anybody having to pull again.
//
// # Which credentials
//
// For a repository, in this order:
//
//  1. what was given for it: by pulls of it that are under way, newest first, then by the last that succeeded;
//  2. docker's configuration and credential helpers, for the repository, then for its host;
//  3. what was given last for other repositories of the same host, at most three;
//  4. nothing: anonymous.
//
// Pull secrets differ from repository to repository, so what was given for this one comes first, and what the
// node's owner wrote down for a whole host comes before what was meant for another repository. But that comes
// too: tokens of cloud registries hold for the host and expire within hours, and an image that has run since
// yesterday reads on with the token of a pull of today. Credentials go to the host that they were given for,
// never to another.
//
// Nothing is remembered about refusals, and no answer is cached. Who is refused asks again, and gets what is
// newest then. [Keychain.Resolve] answers with the first of the list. Who can try more than one, because
// the first has expired or was revoked, walks [Keychain.Candidates].
//
// A pull that fails leaves nothing behind: a pod with a wrong secret does not take the right one away from
// the containers that run.
//
// # Invariants
//
// No credentials are in logs or errors. No file of theirs can be read by others than its owner, or has its
// name before it is on disk whole. No credentials of a pull that has not succeeded are used for another
// repository. No request is changed on its way through the proxy.
//
// Everything here may be used by several goroutines at once.
//
// Sources: the CRI API (https://github.com/kubernetes/cri-api, pkg/apis/runtime/v1/api.proto), containerd's
// internal/cri/server/images/image_pull.go for what its fields mean.
package credentials
