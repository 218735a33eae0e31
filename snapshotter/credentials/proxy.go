package credentials

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// maxMessage is the length of the longest message in bytes, as in containerd's server and the kubelet.
const maxMessage = 16 << 20

// services are what is forwarded. containerd 2 has the first, 1.6 and 1.7 have both.
var services = []string{"/runtime.v1.ImageService/", "/runtime.v1alpha2.ImageService/"}

// A Proxy forwards the CRI's ImageService to containerd, and has a [Keychain] remember the credentials
// of its pulls. It is for kubelet --image-service-endpoint and crictl --image-endpoint, and is made by
// [Keychain.Proxy].
//
// It passes messages on as bytes, with metadata, trailers, statuses and their details, deadlines and
// cancellation, so that fields and methods it has never heard of work. What it cannot read it forwards
// too: containerd is to say what is wrong.
type Proxy struct {
	keychain *Keychain
	socket   string
	conn     *grpc.ClientConn
	readers  sync.WaitGroup // of requests
}

// Proxy returns a Proxy to the CRI socket of a containerd, a path, also with unix:// before it as Kubernetes
// writes it. It connects when it is first needed, and again when containerd was away.
func (k *Keychain) Proxy(socket string) (*Proxy, error) {
	p := &Proxy{keychain: k, socket: strings.TrimPrefix(socket, "unix://")}
	retry := backoff.DefaultConfig
	retry.MaxDelay = time.Second // a socket costs nothing to ask, and the kubelet waits for containerd's restart
	var err error
	// The dialer has the path: in a target, gRPC would take some of its characters for an URL's.
	p.conn, err = grpc.NewClient("passthrough:///localhost",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", p.socket)
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry}),
		grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec), grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("CRI image proxy to %s: %w", p.socket, err)
	}
	return p, nil
}

// ServerOptions returns what the gRPC server needs to serve p. Services that are registered with
// the server work as they do without.
func (p *Proxy) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.UnknownServiceHandler(p.forward),
		grpc.ForceServerCodecV2(codec),
		grpc.MaxRecvMsgSize(maxMessage),
	}
}

// Close disconnects from containerd, which ends what is being forwarded. It is called after the server was stopped.
func (p *Proxy) Close() error {
	err := p.conn.Close()
	p.readers.Wait()
	return err
}

// forward is the grpc.StreamHandler of everything that no service was registered for. All of it is a stream
// of messages in both directions here: a call with one message each way is no different on the wire.
func (p *Proxy) forward(_ any, down grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(down)
	if !forwarded(method) {
		return status.Errorf(codes.Unimplemented, "unknown service or method %s: of the CRI, the ImageService is served here; everything else is containerd's", method)
	}
	ctx := down.Context() // has the deadline, and ends with this call, however it ends
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		delete(md, "grpc-accept-encoding") // is about the connection to here
		ctx = metadata.NewOutgoingContext(ctx, md)
	}
	up, err := p.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return p.unreachable(err)
	}
	done := func(bool) {}
	if strings.HasSuffix(method, "/PullImage") {
		// The credentials must be there before containerd hears of the pull: it asks the
		// snapshotter in the course of it.
		var request frame
		if err := down.RecvMsg(&request); err == nil {
			done = p.remember(request)
			up.SendMsg(&request) // if it does not get there, receiving says why
		} else if !errors.Is(err, io.EOF) {
			return err
		}
	}
	// It ends when the client has sent everything or is gone, at the latest when this function has
	// returned; then its stream is over, which nobody could wait for in here.
	p.readers.Go(func() { requests(up, down) })
	err = answers(down, up)
	done(err == nil)
	return err
}

func forwarded(method string) bool {
	for _, s := range services {
		if strings.HasPrefix(method, s) {
			return true
		}
	}
	return false
}

// requests sends containerd what the client sends.
func requests(up grpc.ClientStream, down grpc.ServerStream) {
	for {
		var f frame
		if err := down.RecvMsg(&f); errors.Is(err, io.EOF) {
			up.CloseSend()
			return
		} else if err != nil {
			return // the client is gone, or sent what is too long and was told so
		}
		if up.SendMsg(&f) != nil {
			return // receiving says why
		}
	}
}

// answers sends the client what containerd answers. Its error is the status of the call, as containerd set it.
func answers(down grpc.ServerStream, up grpc.ClientStream) error {
	// Without headers there are no messages either, and what went wrong comes with the first one.
	if header, _ := up.Header(); header != nil {
		if err := down.SendHeader(header); err != nil {
			return err
		}
	}
	for {
		var f frame
		if err := up.RecvMsg(&f); err != nil {
			down.SetTrailer(up.Trailer())
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := down.SendMsg(&f); err != nil {
			return err
		}
	}
}

// unreachable says what to do if err is about the connection to containerd.
func (p *Proxy) unreachable(err error) error {
	if status.Code(err) != codes.Unavailable {
		return err
	}
	return status.Errorf(codes.Unavailable, "containerd does not answer at %s: start it, or set containerd in lazuli's config.toml to its socket (%s)",
		p.socket, status.Convert(err).Message())
}

// remember has the credentials of a PullImageRequest used, and kept if done is called with true.
func (p *Proxy) remember(request []byte) (done func(pulled bool)) {
	none := func(bool) {}
	r, err := parsePull(request)
	if err != nil {
		return none // containerd says so
	}
	config := r.config()
	log := p.keychain.log.With("image", r.image)
	if config != (authn.AuthConfig{}) && r.misdirected() {
		log.Warn("the pull's credentials are for another server than the image's: they are not kept, and containerd does not use them")
		return none
	}
	settle, err := p.keychain.try(r.image, config)
	if err != nil {
		log.Warn("the pull's credentials are not kept: reading the image later may be refused", "error", err)
		return none
	}
	return func(pulled bool) {
		if err := settle(pulled); err != nil {
			log.Warn("the pull's credentials are not kept on disk: reading the image may be refused after the daemon starts again", "error", err)
		}
	}
}

// A frame is a message as it is on the wire, whatever is in it.
type frame []byte

// codec is protobuf's, and passes frames as they are. It has protobuf's name, because that is what both ends speak.
var codec = frames{encoding.GetCodecV2(proto.Name)}

type frames struct{ encoding.CodecV2 }

func (c frames) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		return mem.BufferSlice{mem.SliceBuffer(*f)}, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c frames) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		*f = data.Materialize() // a copy: data is used again
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}
