package credentials

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/google/go-containerregistry/pkg/authn"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A runtime is a CRI server that does what the test says, instead of containerd.
type runtime struct {
	pull func(ctx context.Context, request []byte) ([]byte, error)
	talk func(grpc.ServerStream) error
}

// start serves the runtime's ImageService at socket, until the test ends.
func (r *runtime) start(t testing.TB, socket string) {
	s := grpc.NewServer(grpc.ForceServerCodecV2(codec), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.WaitForHandlers(true))
	for _, service := range []string{"runtime.v1.ImageService", "runtime.v1alpha2.ImageService"} {
		s.RegisterService(&grpc.ServiceDesc{
			ServiceName: service,
			Methods: []grpc.MethodDesc{{MethodName: "PullImage", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				var f frame
				if err := decode(&f); err != nil {
					return nil, err
				}
				answer, err := r.pull(ctx, f)
				return (*frame)(&answer), err
			}}},
			Streams: []grpc.StreamDesc{{StreamName: "Talk", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
				return r.talk(s)
			}}},
		}, nil)
	}
	listen(t, s, socket)
}

func listen(t testing.TB, s *grpc.Server, socket string) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	must(t, err)
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func dial(t testing.TB, socket string, o ...grpc.CallOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(o...))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// raw are the options of a client that has messages as bytes.
var raw = []grpc.CallOption{grpc.ForceCodecV2(codec), grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)}

// proxied serves a proxy to socket, with the snapshots service beside it as in the daemon, and returns a client of both.
func proxied(t testing.TB, k *Keychain, socket string) (front string) {
	t.Helper()
	p, err := k.Proxy("unix://" + socket)
	must(t, err)
	t.Cleanup(func() { must(t, p.Close()) })
	s := grpc.NewServer(append(p.ServerOptions(), grpc.WaitForHandlers(true))...)
	snapshots.RegisterSnapshotsServer(s, stat{})
	front = filepath.Join(t.TempDir(), "s")
	listen(t, s, front)
	return front
}

// stat is a snapshots service that knows one method.
type stat struct {
	snapshots.UnimplementedSnapshotsServer
}

func (stat) Stat(_ context.Context, r *snapshots.StatSnapshotRequest) (*snapshots.StatSnapshotResponse, error) {
	return &snapshots.StatSnapshotResponse{Info: &snapshots.Info{Name: r.Snapshotter + " " + r.Key, Kind: snapshots.Kind_COMMITTED}}, nil
}

func call(ctx context.Context, conn *grpc.ClientConn, method string, request []byte, o ...grpc.CallOption) ([]byte, error) {
	var answer frame
	err := conn.Invoke(ctx, method, (*frame)(&request), &answer, o...)
	return answer, err
}

const (
	pullImage = "/runtime.v1.ImageService/PullImage"
	talk      = "/runtime.v1.ImageService/Talk"
)

// TestProxyUnary: messages, metadata, trailers, deadlines and errors of a call that has one of each.
func TestProxyUnary(t *testing.T) {
	clean(t)
	k := open(t, t.TempDir())
	var r runtime
	socket := filepath.Join(t.TempDir(), "odd %20?#name")
	r.start(t, socket)
	front := proxied(t, k, socket)
	conn := dial(t, front, raw...)
	ctx := t.Context()

	var got metadata.MD
	var deadline time.Time
	r.pull = func(ctx context.Context, request []byte) ([]byte, error) {
		got, _ = metadata.FromIncomingContext(ctx)
		deadline, _ = ctx.Deadline()
		grpc.SetHeader(ctx, metadata.Pairs("h", "1", "h", "2", "h-bin", "\x00\xff"))
		grpc.SetTrailer(ctx, metadata.Pairs("t", "3"))
		return append([]byte("answer to "), request...), nil
	}
	// Anything goes through, also what is no protobuf; the methods of both versions.
	for _, method := range []string{pullImage, "/runtime.v1alpha2.ImageService/PullImage"} {
		for _, request := range []string{"", "\xff\xff\xff", "\x0a\x05x"} {
			var header, trailer metadata.MD
			answer, err := call(metadata.AppendToOutgoingContext(ctx, "k", "v", "k", "w", "k-bin", "\x00\x01", "grpc-accept-encoding", "x"), conn, method, []byte(request), grpc.Header(&header), grpc.Trailer(&trailer))
			if err != nil || string(answer) != "answer to "+request {
				t.Fatalf("%s %q: %q, %v", method, request, answer, err)
			}
			if !slices.Equal(header["h"], []string{"1", "2"}) || !slices.Equal(header["h-bin"], []string{"\x00\xff"}) || !slices.Equal(trailer["t"], []string{"3"}) {
				t.Errorf("header %v, trailer %v", header, trailer)
			}
			if !slices.Equal(got["k"], []string{"v", "w"}) || !slices.Equal(got["k-bin"], []string{"\x00\x01"}) || len(got["content-type"]) != 1 || len(got["grpc-accept-encoding"]) != 0 {
				t.Errorf("the request's metadata arrived as %v", got)
			}
			if !deadline.IsZero() {
				t.Error("there is a deadline that nobody set")
			}
		}
	}
	far, cancel := context.WithTimeout(ctx, time.Hour)
	defer cancel()
	if _, err := call(far, conn, pullImage, nil); err != nil || time.Until(deadline) > time.Hour || time.Until(deadline) < time.Minute {
		t.Errorf("%v; the deadline is in %v, want an hour", err, time.Until(deadline))
	}

	// A client with messages of its own, as all are.
	r.pull = func(ctx context.Context, request []byte) ([]byte, error) { return request, nil }
	var echo wrapperspb.StringValue
	if err := dial(t, front).Invoke(ctx, pullImage, wrapperspb.String("grüße"), &echo); err != nil || echo.Value != "grüße" {
		t.Errorf("echo of a message: %q, %v", echo.Value, err)
	}

	// As large as it gets, and one byte more, which this end refuses.
	big := bytes.Repeat([]byte("0123456789abcdef"), maxMessage/16)
	if answer, err := call(ctx, conn, pullImage, big); err != nil || !bytes.Equal(answer, big) {
		t.Errorf("%d bytes come back as %d, %v", len(big), len(answer), err)
	}
	wide := grpc.MaxCallSendMsgSize(maxMessage + 1)
	r.talk = func(s grpc.ServerStream) error { return s.RecvMsg(new(frame)) }
	for _, method := range []string{pullImage, talk} {
		if _, err := call(ctx, conn, method, append(big, 0), wide); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s with %d bytes: %v", method, len(big)+1, err)
		}
	}

	// An error with details, without headers.
	failed, err := status.New(codes.FailedPrecondition, "so not: ü\n").WithDetails(wrapperspb.String("detail"), wrapperspb.Int64(7))
	must(t, err)
	r.pull = func(ctx context.Context, request []byte) ([]byte, error) {
		grpc.SetTrailer(ctx, metadata.Pairs("t", "4"))
		return nil, failed.Err()
	}
	var trailer metadata.MD
	_, err = call(ctx, conn, pullImage, nil, grpc.Trailer(&trailer))
	if s := status.Convert(err); s.Code() != failed.Code() || s.Message() != failed.Message() || len(s.Details()) != 2 ||
		s.Details()[0].(*wrapperspb.StringValue).Value != "detail" || s.Details()[1].(*wrapperspb.Int64Value).Value != 7 {
		t.Errorf("the error arrived as %v with %v", err, s.Details())
	}
	if !slices.Equal(trailer["t"], []string{"4"}) {
		t.Errorf("the error's trailer arrived as %v", trailer)
	}
}

// TestProxyOthers: what is not the CRI's ImageService is not forwarded, and services of the same server work as ever.
func TestProxyOthers(t *testing.T) {
	clean(t)
	k := open(t, t.TempDir())
	front := proxied(t, k, "/nowhere/containerd.sock")
	ctx := t.Context()
	conn := dial(t, front)
	r, err := snapshots.NewSnapshotsClient(conn).Stat(ctx, &snapshots.StatSnapshotRequest{Snapshotter: "lazuli", Key: "sha256:1"})
	if err != nil || r.Info.Name != "lazuli sha256:1" || r.Info.Kind != snapshots.Kind_COMMITTED {
		t.Errorf("snapshots service: %v, %v", r, err)
	}
	if _, err := snapshots.NewSnapshotsClient(conn).Remove(ctx, &snapshots.RemoveSnapshotRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a method without code: %v", err)
	}
	for _, method := range []string{
		"/runtime.v1.RuntimeService/Version",
		"/runtime.v1.ImageServiceX/PullImage",
		"/x/runtime.v1.ImageService/PullImage",
		"/runtime.v1.ImageService",
		"/containerd.services.snapshots.v1.Snapshots/PullImage",
		"/containerd.services.images.v1.Images/List",
	} {
		var answer wrapperspb.StringValue
		if err := conn.Invoke(ctx, method, wrapperspb.String("x"), &answer); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", method, err)
		}
	}
	// containerd is not there.
	var answer wrapperspb.StringValue
	err = conn.Invoke(ctx, pullImage, wrapperspb.String("x"), &answer)
	if s := status.Convert(err); s.Code() != codes.Unavailable || !strings.Contains(s.Message(), "at /nowhere/containerd.sock: start it") {
		t.Errorf("without containerd: %v", err)
	}
}

// TestProxyLate: containerd may come later than the proxy, and go away and come back.
func TestProxyLate(t *testing.T) {
	clean(t)
	k := open(t, t.TempDir())
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	conn := dial(t, proxied(t, k, socket), raw...)
	until := func(want codes.Code) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			_, err := call(t.Context(), conn, pullImage, nil)
			if status.Code(err) == want {
				return
			}
			if status.Code(err) != codes.Unavailable || time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	until(codes.Unavailable)
	for range 2 {
		t.Run("there", func(t *testing.T) {
			r := runtime{pull: func(context.Context, []byte) ([]byte, error) { return nil, nil }}
			r.start(t, socket)
			until(codes.OK)
		})
		until(codes.Unavailable)
	}
}

// TestProxyPull: which pulls' credentials are used, and which are kept.
func TestProxyPull(t *testing.T) {
	clean(t)
	dir := t.TempDir()
	var log bytes.Buffer
	k, err := Open(dir, slog.New(slog.NewTextHandler(&log, nil)))
	must(t, err)
	var r runtime
	socket := filepath.Join(t.TempDir(), "s")
	r.start(t, socket)
	conn := dial(t, proxied(t, k, socket), raw...)
	const image, repository = "r.example.com/app:1", "r.example.com/app"

	// during is what is answered while containerd pulls; kept is what is on disk afterwards.
	check := func(p pull, result error, during, kept authn.AuthConfig) {
		t.Helper()
		var saw authn.AuthConfig
		var same bool
		r.pull = func(ctx context.Context, request []byte) ([]byte, error) {
			saw = resolve(t, k, repository)
			same = bytes.Equal(request, p.encode())
			return []byte("id"), result
		}
		if answer, err := call(t.Context(), conn, pullImage, p.encode()); status.Code(err) != status.Code(result) || err == nil && string(answer) != "id" {
			t.Errorf("%+v: %q, %v", p, answer, err)
		}
		if !same {
			t.Errorf("%+v: containerd got something else", p)
		}
		if saw != during {
			t.Errorf("%+v: %+v while it is pulled, want %+v", p, saw, during)
		}
		if got := resolve(t, k, repository); got != kept {
			t.Errorf("%+v: %+v afterwards, want %+v", p, got, kept)
		}
		if got := resolve(t, open(t, dir), repository); got != kept {
			t.Errorf("%+v: %+v on disk, want %+v", p, got, kept)
		}
	}
	user := func(u string) pull {
		c := login(u)
		return pull{image: image, username: c.Username, password: c.Password}
	}
	none := authn.AuthConfig{}
	denied := status.Error(codes.Unknown, "401 Unauthorized")
	check(pull{image: image}, nil, none, none)
	check(user("wrong"), denied, login("wrong"), none)
	check(user("right"), nil, login("right"), login("right"))
	check(user("wrong"), denied, login("wrong"), login("right"))
	check(pull{image: image}, nil, login("right"), login("right")) // a pull without credentials takes nothing away
	check(pull{image: image, auth: "bm8gY29sb24="}, denied, login("right"), login("right"))
	check(pull{image: image, username: "GEHEIM", password: "GEHEIM\n"}, denied, login("right"), login("right"))
	elsewhere := user("elsewhere")
	elsewhere.serverAddress = "https://GEHEIM@evil.example.com"
	check(elsewhere, nil, login("right"), login("right"))
	here := user("here")
	here.serverAddress = "https://r.example.com/v2/"
	check(here, nil, login("here"), login("here"))
	check(pull{image: image, auth: "dTpw"}, nil, authn.AuthConfig{Username: "u", Password: "p"}, authn.AuthConfig{Username: "u", Password: "p"})
	check(pull{image: image, identityToken: "i", auth: "dTpw"}, nil, authn.AuthConfig{IdentityToken: "i"}, authn.AuthConfig{IdentityToken: "i"})

	if n := strings.Count(log.String(), "level=WARN"); n != 3 {
		t.Errorf("%d warnings, want 3: for auth, the newline and the other server", n)
	}
	for _, secret := range []string{"GEHEIM", "password=", "wrong's", "right's"} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log has %q:\n%s", secret, &log)
		}
	}
	if len(k.tried) > 0 {
		t.Errorf("%d pulls are still under way", len(k.tried))
	}
}

// TestProxyStream: many messages in both directions, each as soon as it is there.
func TestProxyStream(t *testing.T) {
	clean(t)
	var r runtime
	socket := filepath.Join(t.TempDir(), "s")
	r.start(t, socket)
	conn := dial(t, proxied(t, open(t, t.TempDir()), socket), raw...)
	both := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}

	r.talk = func(s grpc.ServerStream) error {
		if err := s.SendHeader(metadata.Pairs("h", "first")); err != nil {
			return err
		}
		for {
			var f frame
			if err := s.RecvMsg(&f); errors.Is(err, io.EOF) {
				s.SetTrailer(metadata.Pairs("t", "last"))
				bye := frame("bye")
				for range 3 {
					if err := s.SendMsg(&bye); err != nil {
						return err
					}
				}
				return status.Error(codes.Aborted, "done")
			} else if err != nil {
				return err
			}
			f = append([]byte("re: "), f...)
			if err := s.SendMsg(&f); err != nil {
				return err
			}
		}
	}
	s, err := conn.NewStream(t.Context(), both, talk)
	must(t, err)
	if md, err := s.Header(); err != nil || !slices.Equal(md["h"], []string{"first"}) { // before anything is said
		t.Errorf("header %v, %v", md, err)
	}
	for _, say := range []string{"one", "", "three"} {
		f := frame(say)
		must(t, s.SendMsg(&f))
		must(t, s.RecvMsg(&f))
		if string(f) != "re: "+say {
			t.Errorf("%q is answered %q", say, f)
		}
	}
	must(t, s.CloseSend())
	for range 3 {
		var f frame
		if err := s.RecvMsg(&f); err != nil || string(f) != "bye" {
			t.Errorf("%q, %v at the end", f, err)
		}
	}
	if err := s.RecvMsg(new(frame)); status.Code(err) != codes.Aborted || !slices.Equal(s.Trailer()["t"], []string{"last"}) {
		t.Errorf("ends with %v and %v", err, s.Trailer())
	}

	// The server ends while the client could still say something.
	r.talk = func(s grpc.ServerStream) error { return nil }
	s, err = conn.NewStream(t.Context(), both, talk)
	must(t, err)
	if err := s.RecvMsg(new(frame)); !errors.Is(err, io.EOF) {
		t.Errorf("the server said nothing: %v", err)
	}
}

// TestProxyCancel: a client that gives up ends the call in containerd.
func TestProxyCancel(t *testing.T) {
	clean(t)
	k := open(t, t.TempDir())
	var r runtime
	socket := filepath.Join(t.TempDir(), "s")
	r.start(t, socket)
	conn := dial(t, proxied(t, k, socket), raw...)
	began, ended := make(chan bool), make(chan error)
	wait := func(ctx context.Context) error {
		began <- true
		<-ctx.Done()
		ended <- ctx.Err()
		return status.FromContextError(ctx.Err()).Err()
	}
	r.pull = func(ctx context.Context, _ []byte) ([]byte, error) { return nil, wait(ctx) }
	r.talk = func(s grpc.ServerStream) error { return wait(s.Context()) }

	// until cancels the call that does makes as soon as containerd has it.
	until := func(do func(ctx context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		failed := make(chan error, 1)
		go func() { failed <- do(ctx) }()
		select {
		case <-began:
		case err := <-failed:
			t.Fatal(err)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("containerd's call ends with %v", err)
		}
		if err := <-failed; status.Code(err) != codes.Canceled {
			t.Errorf("the client's call ends with %v", err)
		}
	}
	until(func(ctx context.Context) error {
		_, err := call(ctx, conn, pullImage, pull{image: "r.example.com/app", username: "u"}.encode())
		return err
	})
	until(func(ctx context.Context) error {
		s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, talk)
		if err == nil {
			err = s.RecvMsg(new(frame))
		}
		return err
	})
	// The failed pull is forgotten when its call has ended here too, which the client does not wait for.
	for deadline := time.Now().Add(time.Minute); resolve(t, k, "r.example.com/app") != (authn.AuthConfig{}); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the credentials of a pull that was given up are still used")
		}
	}
	if files, err := os.ReadDir(k.dir); err != nil || len(files) > 0 {
		t.Errorf("kept are %v, %v", files, err)
	}
}
